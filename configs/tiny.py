"""Trains a light denoiser that drafts for the built-in teacher; the README's main job.

Meant for 2 CPU cores, where it ends within ten minutes. The teacher answers 3,072 word problems;
three layers that read its keys, values and states learn from the answers to draft what it will
write next. In lossless mode the teacher verifies the drafts, so the text is exactly the teacher's.

  python -m diffusiongemma.distill --config=configs/tiny.py --workdir=/tmp/diffusiongemma
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'builtin-teacher',
            'denoise_dtype': 'bfloat16',  # faster on a CPU with AVX512-BF16
            'denoiser': 'light',  # a few layers that read the frozen teacher's states
            'light': {
                'layers': (2, 3, 4),  # of the teacher's five; they initialize the draft layers
                'serial_rank': 64,
            },
            'canvas_length': 7,  # with the pending token, a verification reads 8 tokens
            'self_conditioning': False,  # a draft takes one step, with no previous prediction
            # Stage 0: the teacher answers these prompts, and the student learns its answers.
            'targets': {
                'source': {'kind': 'wordmath', 'size': 3_072, 'seed': 1},
                'max_new_tokens': 96,
            },
            'data': {'batch_size': 4, 'row_length': 256},
            'drafting': {'weights': 'accepted_length', 'anchors_per_row': 48},
            'corruption': 'masked',
            'optimizer': {
                'learning_rate': 5e-3,
                'warmup_steps': 40,
                'weight_decay': 0.0,
                'ema_decay': 0.99,
            },
            'train': {'num_steps': 800, 'report_every': 50, 'checkpoint_every': 400},
            'sampling': {
                'max_new_tokens': 96,
                'temperature': 0.0,
                # These two apply to students with a diffusion mode, such as 'builtin'.
                'max_denoising_steps': 4,
                'stability_threshold': 0,
            },
            'eval': {
                'source': {'kind': 'wordmath', 'split': 'test', 'size': 256},
                'speed_batch_sizes': (1, 8, 32),
                'prompt_multiple': 16,  # prompts have about 25 to 55 tokens
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (1, 4, 16),
                },
            },
        }
    )
