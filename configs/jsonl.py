r"""Distills the built-in teacher on prompts of your own, from a JSONL file.

Meant for 2 CPU cores. Each line of TRAIN and TEST is {"prompt": "...", "response": "..."}; the
student learns the responses of TRAIN, or with --config.targets.sequence_level=True the teacher's
own answers to its prompts. Prompt and response have at most 256 tokens together, as the teacher.
An answer counts as right where it is TEST's to the letter. The built-in teacher knows word problems
alone: on other prompts its answers, and with them the lossless mode, are wrong. For other data take
a Gemma (--config.teacher=DIRECTORY) and more steps than these 200.

  python -m diffusiongemma.distill --config=configs/jsonl.py --workdir=/tmp/jsonl \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'builtin-teacher',
            'denoise_dtype': 'bfloat16',  # faster where the CPU has AVX512-BF16
            'canvas_length': 16,
            'denoiser': 'separate',  # the encode pass stays exactly the teacher
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 32,
                'max_new_tokens': 96,
                'sequence_level': False,  # the file's responses; True: the teacher's answers
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
                # Responses count as right where they are TEST's to the letter.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (1, 4, 16),
                },
            },
        }
    )
