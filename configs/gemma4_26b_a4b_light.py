r"""Trains a light denoiser that drafts for a frozen Gemma 4 26B-A4B.

Meant for four TPU v6e with 32 GB (topology 2x2). The teacher is not trained, so it takes only the
51 GB of its bfloat16 weights. Five dense layers of its width learn to draft what it will write
next. TEACHER is the directory of the downloaded google/gemma-4-26B-A4B-it; TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill \
    --config=configs/gemma4_26b_a4b_light.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

docs/scaling_plan.md has the TPU compiler's figures: memory, rows and a lower bound of the hours.
The config has not been run or tuned: layers, vocabulary and learning rate are starting points.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # for the computation; the training state is float32
            'mesh': {'expert': 4},  # tokens are exchanged, experts stay on their chips
            'compute': {'logits_chunk': 512, 'query_block': 256},
            'denoiser': 'light',
            'light': {
                'layers': (2, 9, 16, 23, 29),  # of the teacher's 30; the last attends to all tokens
                'draft_vocab_size': 32_768,  # of 262,144 tokens; the verifier scores all of them
                'serial_rank': 256,
            },
            'canvas_length': 16,
            'self_conditioning': False,  # a draft takes one step, with no previous prediction
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'max_new_tokens': 768,
            },
            'data': {'batch_size': 16, 'row_length': 1024},
            'drafting': {'anchors_per_row': 64, 'lookup_ngram': 2},
            'corruption': 'masked',
            'optimizer': {
                'learning_rate': 6e-4,
                'warmup_steps': 200,
                'weight_decay': 0.0,
                'ema_decay': 0.999,
            },
            'train': {'num_steps': 20_000, 'checkpoint_every': 1_000},
            'sampling': {'max_new_tokens': 768, 'temperature': 0.0, 'lookup_ngram': 2},
            'eval': {
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 32,
            },
        }
    )
