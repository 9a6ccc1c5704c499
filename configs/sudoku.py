"""Distils the built-in teacher into a student that fills in a sudoku as one canvas.

Meant for 2 CPU cores, where it takes about 50 minutes. The grid of 9 x 9 is one canvas of 96
tokens, of which any may be settled first, where the teacher has to write row by row. Corruption is
masked: what the clues force is settled, and stays, before what follows from it.

  python -m diffusiongemma.distill --config=configs/sudoku.py --workdir=/tmp/sudoku
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'seed': 0,
            'dtype': 'float32',
            'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'expert': 1, 'sequence': 1},
            # Memory against time, see docs/scaling.md; these defaults keep all.
            'compute': {'remat': 'none', 'logits_chunk': 0, 'query_block': 0, 'microbatches': 1},
            'teacher': 'builtin-teacher',
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            'denoise_dtype': 'bfloat16',  # faster where the CPU has AVX512-BF16
            'canvas_length': 96,  # a solved grid has 90 tokens
            'predict_next': False,
            'denoiser': 'separate',  # the encode pass stays exactly the teacher
            'self_conditioning': False,  # settled cells say what is known
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'denoise'},  # rank 0: train all layers
            'targets': {
                'source': {
                    'kind': 'sudoku',
                    'split': 'train',
                    'size': 1_000_000,
                    'seed': 1,
                    'min_clues': 30,
                    'max_clues': 45,
                },
                'batch_size': 128,
                'max_new_tokens': 96,
                # There is one solution, which the teacher rarely finds: learn it from the data.
                'sequence_level': False,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 8,
                'row_length': 400,  # two puzzles of 103 tokens with their solutions
                'canvases_per_row': 2,
                'random_offset_rate': 0.0,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'corruption': 'masked',
            'ar_weight': 0.1,  # of no effect on a separate denoiser, whose encode pass is frozen
            'stage1': {'kd_weight': 0.0, 'self_conditioning_rate': 0.0},  # nor its guesses
            'stage2': {  # not reached: accuracy counts here, not few steps
                'first_step': 2_000,
                'num_steps': 2,
                'all_noise_rate': 0.5,
                'kd_weight': 0.0,
            },
            'optimizer': {'learning_rate': 2e-3, 'warmup_steps': 100, 'ema_decay': 0.995},
            'train': {'num_steps': 2_000, 'report_every': 20, 'checkpoint_every': 200},
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
                'batch_size': 32,
                'speed_batch_sizes': (1, 8),
                'speed_batches': 8,
                'sweep': {
                    'entropy_bound': (0.01, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 64),
                    'canvas_length': (),
                },
            },
        }
    )
