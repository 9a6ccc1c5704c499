"""Distills the built-in teacher into a student that fills in a sudoku as one canvas.

Meant for 2 CPU cores, where it takes about 50 minutes. The grid of 9 x 9 is one canvas of 96
tokens, which may be settled in any order, whereas the teacher has to write row by row. With masked
corruption, a token that is settled stays, so the cells that the clues force are filled in first and
the others follow from them.

  python -m diffusiongemma.distill --config=configs/sudoku.py --workdir=/tmp/sudoku
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'teacher': 'builtin-teacher',
            'denoise_dtype': 'bfloat16',  # faster on a CPU with AVX512-BF16
            'canvas_length': 96,  # a solved grid has 90 tokens
            'predict_next': False,
            'denoiser': 'separate',  # the encode pass remains exactly the teacher's
            'self_conditioning': False,  # the settled cells hold what is known
            'targets': {
                'source': {
                    'kind': 'sudoku',
                    'size': 1_000_000,
                    'seed': 1,
                    'min_clues': 30,
                    'max_clues': 45,
                },
                'max_new_tokens': 96,
                # The teacher rarely finds the only solution, so learn it from the data.
                'sequence_level': False,
            },
            'data': {
                'batch_size': 8,
                'row_length': 400,  # two puzzles of 103 tokens with their solutions
                'canvases_per_row': 2,
            },
            'corruption': 'masked',
            # For the same reason the teacher's distributions are not used. There is no second
            # stage, because accuracy matters here, not the number of steps.
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
