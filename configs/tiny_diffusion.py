"""Distills the built-in teacher into a student with a separate denoiser, for the diffusion mode.

Meant for 2 CPU cores, where it ends within 15 minutes.

  python -m diffusiongemma.distill --config=configs/tiny_diffusion.py --workdir=/tmp/tiny_diffusion
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
            # Stage 0: the teacher answers these prompts, and the student learns its answers.
            'targets': {
                'source': {'kind': 'wordmath', 'size': 2_048, 'seed': 1},
                'max_new_tokens': 96,
            },
            'data': {
                'batch_size': 16,
                'row_length': 256,
                'canvases_per_row': 10,
                'random_offset_rate': 0.25,  # lossless drafts start where the last one was rejected
            },
            'stage2': {'first_step': 160},
            'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 40, 'ema_decay': 0.98},
            'train': {'num_steps': 240, 'report_every': 10, 'checkpoint_every': 80},
            'sampling': {
                'max_new_tokens': 96,
                'max_denoising_steps': 4,
                # Confidence alone ends a canvas, which saves most canvases a pass.
                'stability_threshold': 0,
                'temperature': 0.0,
            },
            'eval': {
                'source': {'kind': 'wordmath', 'split': 'test', 'size': 256},
                'prompt_multiple': 16,  # prompts have about 25 to 55 tokens
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (1, 4, 16),
                },
            },
        }
    )
