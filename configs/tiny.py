"""Trains a light denoiser that drafts for the built-in teacher; the README's main job.

Meant for 2 CPU cores, where it ends within ten minutes. The teacher answers 3,072 word problems;
three layers that read its keys, values and states learn from the answers to draft what it will
write next. In lossless mode the teacher verifies the drafts, so the text stays its own.

  python -m diffusiongemma.distill --config=configs/tiny.py --workdir=/tmp/diffusiongemma
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
            'denoiser': 'light',  # a few layers on the frozen teacher's states
            'light': {
                'layers': (2, 3, 4),  # of the teacher's five; the draft layers start from these
                'teacher_state': True,
                'draft_vocab_size': 0,  # 0: all tokens
                'serial_rank': 64,
            },
            'canvas_length': 12,
            'predict_next': True,  # what the teacher knows is of use from the first step on
            'self_conditioning': False,  # drafts take one step, which has none before it
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'denoise'},  # rank 0: train all layers
            # Stage 0: the teacher answers these prompts; the student learns its answers.
            'targets': {
                'source': {'kind': 'wordmath', 'split': 'train', 'size': 3_072, 'seed': 1},
                'batch_size': 128,
                'max_new_tokens': 96,
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 4,
                'row_length': 256,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'drafting': {
                'weights': 'accepted_length',
                'smoothing': 0.5,
                'anchors_per_row': 32,
                'refused_rate': 0.0,
                'total_variation': 0.0,
                'held_out': 64,
            },
            'corruption': 'masked',
            'ar_weight': 0.0,  # the encode pass is frozen
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
                # Of students with a diffusion mode, such as 'builtin'.
                'max_denoising_steps': 4,
                'stability_threshold': 0,
            },
            'eval': {
                'source': {'kind': 'wordmath', 'split': 'test', 'size': 256},
                'batch_size': 32,
                'speed_batch_sizes': (1, 8, 32),
                'speed_batches': 24,
                'prompt_multiple': 16,  # prompts have some 25 to 55 tokens
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (1, 4, 16),
                    'canvas_length': (),  # (): the student's own
                },
            },
        }
    )
