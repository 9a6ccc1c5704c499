"""Distills the built-in teacher into a student that fills in a sudoku as one canvas.

Meant for 2 CPU cores, where it takes about 50 minutes. The grid of 9 x 9 is one canvas of 96
tokens, of which any may be settled first, where the teacher has to write row by row. Corruption is
masked: what the clues force is settled, and stays, before what follows from it.

  python -m diffusiongemma.distill --config=configs/sudoku.py --workdir=/tmp/sudoku
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'builtin-teacher',
            'denoise_dtype': 'bfloat16',  # faster where the CPU has AVX512-BF16
            'canvas_length': 96,  # a solved grid has 90 tokens
            'predict_next': False,
            'denoiser': 'separate',  # the encode pass stays exactly the teacher
            'self_conditioning': False,  # settled cells say what is known
            'targets': {
                'source': {
                    'kind': 'sudoku',
                    'size': 1_000_000,
                    'seed': 1,
                    'min_clues': 30,
                    'max_clues': 45,
                },
                'max_new_tokens': 96,
                # There is one solution, which the teacher rarely finds: learn it from the data.
                'sequence_level': False,
            },
            'data': {
                'batch_size': 8,
                'row_length': 400,  # two puzzles of 103 tokens with their solutions
                'canvases_per_row': 2,
            },
            'corruption': 'masked',
            # Nor its guesses. There is no second stage: accuracy counts here, not few steps.
            'stage1': {'kd_weight': 0.0, 'self_conditioning_rate': 0.0},
            'optimizer': {'learning_rate': 2e-3, 'warmup_steps': 100, 'ema_decay': 0.995},
            'train': {
                'num_steps': 2_000,
            },
            'sampling': {
                'max_new_tokens': 96,
                'max_denoising_steps': 64,
                'entropy_bound': 0.01,
                'temperature': 0.0,
            },
            'eval': {
                'source': {
                    'kind': 'sudoku',
                    'split': 'test',
                    'size': 128,
                    'min_clues': 30,
                    'max_clues': 45,
                },
                'speed_batches': 8,
                'sweep': {
                    'entropy_bound': (0.01, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 64),
                },
            },
        }
    )
