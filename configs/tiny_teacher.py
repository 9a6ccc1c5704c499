"""Trains the built-in AR teacher: a 4M-parameter Gemma on the built-in tasks.

Meant for 2 CPU cores.

  python -m diffusiongemma.train --config=configs/tiny_teacher.py --workdir=/tmp/teacher
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import teacher_config


def get_config() -> ConfigDict:
    return teacher_config(
        {
            'model': {
                'vocab_size': 1024,
                'width': 256,
                'num_heads': 4,
                'ffn_width': 768,
                'max_positions': 256,
                'layer_types': ('sliding', 'sliding', 'sliding', 'sliding', 'full'),
                'sliding': {'num_kv_heads': 2, 'head_dim': 64, 'window': 128},
                'full': {
                    'num_kv_heads': 1,
                    'head_dim': 128,
                    'rope_theta': 1e6,
                    'rope_fraction': 0.25,
                    'value_is_key': True,
                },
            },
            'data': {
                'sources': (
                    {'kind': 'wordmath', 'size': 1_000_000, 'weight': 0.97},
                    {'kind': 'sudoku', 'size': 1_000_000, 'weight': 0.03},
                ),
                'batch_size': 8,
                'row_length': 256,
            },
            'optimizer': {'learning_rate': 3e-3, 'warmup_steps': 150, 'ema_decay': 0.995},
            'train': {
                'num_steps': 2200,
            },
        }
    )
