"""Distills the built-in teacher into a student with a separate denoiser, for the diffusion mode.

Meant for 2 CPU cores, where it ends within 15 minutes.

  python -m diffusiongemma.distill --config=configs/tiny_diffusion.py --workdir=/tmp/tiny_diffusion
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
            'canvas_length': 16,
            'predict_next': True,  # what the teacher knows is of use from the first step on
            'denoiser': 'separate',  # the encode pass stays exactly the teacher
            'self_conditioning': True,  # a step sees what the step before believed
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'denoise'},  # rank 0: train all layers
            # Stage 0: the teacher answers these prompts; the student learns its answers.
            'targets': {
                'source': {'kind': 'wordmath', 'split': 'train', 'size': 2_048, 'seed': 1},
                'batch_size': 128,
                'max_new_tokens': 96,
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 16,
                'row_length': 256,
                'canvases_per_row': 10,
                'random_offset_rate': 0.25,  # lossless drafts start where the last one fell
                'one_canvas': False,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'corruption': 'uniform',
            'ar_weight': 0.1,  # of no effect on a separate denoiser, whose encode pass is frozen
            'stage1': {'kd_weight': 1.0, 'self_conditioning_rate': 0.5},
            'stage2': {
                'first_step': 160,
                'num_steps': 2,
                'all_noise_rate': 0.5,
                'kd_weight': 1.0,
                'certainty_weight': 0.0,
            },
            'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 40, 'ema_decay': 0.98},
            'train': {'num_steps': 240, 'report_every': 10, 'checkpoint_every': 80},
            'sampling': {
                'max_new_tokens': 96,
                'max_denoising_steps': 4,
                'max_draft_steps': 1,
                'stability_threshold': 0,  # confidence alone ends a canvas: a pass less for most
                'temperature': 0.0,
            },
            'eval': {
                'source': {'kind': 'wordmath', 'split': 'test', 'size': 256},
                'batch_size': 32,
                'speed_batch_sizes': (1, 8),
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
