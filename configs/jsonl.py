r"""Distills the built-in teacher on your own prompts, from a JSONL file.

Meant for 2 CPU cores. Each line of TRAIN and TEST is {"prompt": "...", "response": "..."}; the
student learns the responses of TRAIN, or with --config.targets.sequence_level=True the teacher's
own answers to these prompts. Prompt and response together have at most 256 tokens, the teacher's
maximum. An answer is correct if it equals TEST's exactly. The built-in teacher can only solve word
problems: its answers to other prompts, and so those of the lossless mode, are wrong. For other data
use a Gemma (--config.teacher=DIRECTORY) and more steps than these 200.

  python -m diffusiongemma.distill --config=configs/jsonl.py --workdir=/tmp/jsonl \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'builtin-teacher',
            'denoise_dtype': 'bfloat16',  # faster on a CPU with AVX512-BF16
            'canvas_length': 16,
            'denoiser': 'separate',  # the encode pass remains exactly the teacher's
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 32,
                'max_new_tokens': 96,
                'sequence_level': False,  # learn the file's responses; True: the teacher's
            },
            'data': {
                'batch_size': 16,
                'row_length': 256,  # the teacher's longest sequence
                'canvases_per_row': 10,
            },
            'stage2': {'first_step': 100},
            'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 50, 'ema_decay': 0.99},
            'train': {'num_steps': 200, 'report_every': 10, 'checkpoint_every': 60},
            'sampling': {'max_new_tokens': 96, 'max_denoising_steps': 16, 'temperature': 0.0},
            'eval': {
                # A response is correct if it equals TEST's exactly.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (1, 4, 16),
                },
            },
        }
    )
