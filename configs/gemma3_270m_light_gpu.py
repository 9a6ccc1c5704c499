"""Trains a light denoiser that drafts for the pretrained Gemma 3 270M.

Meant for one GPU with 80 GB, and to end within 12 minutes there: the teacher continues all 10,000
windows of the Python standard library's training files, then six draft layers are trained on them.
The same on 2 CPU cores, over hours, is configs/gemma3_270m_light.py.

  XLA_PYTHON_CLIENT_MEM_FRACTION=.9 python -m diffusiongemma.distill \
    --config=configs/gemma3_270m_light_gpu.py --workdir=DIR

Nobody has run it on a GPU yet. Its step, compiled for a CPU, takes 36 GB.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'seed': 0,
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'expert': 1, 'sequence': 1},
            # Memory against time, see docs/scaling.md; these defaults keep all.
            'compute': {'remat': 'none', 'logits_chunk': 0, 'query_block': 0, 'microbatches': 1},
            'teacher': 'gemma3-270m',
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            'denoise_dtype': 'bfloat16',
            'denoiser': 'light',  # a few layers on the frozen teacher's states
            'light': {
                'layers': (0, 1, 5, 11, 16, 17),  # of the teacher's 18
                'teacher_state': True,
                'draft_vocab_size': 8_192,  # of 262,144; the verifier scores all
                'serial_rank': 256,
            },
            'canvas_length': 16,
            'predict_next': True,  # what the teacher knows is of use from the first step on
            'self_conditioning': False,  # drafts take one step, which has none before it
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'denoise'},  # rank 0: train all layers
            # Stage 0: the teacher goes on with these texts; the student learns what it writes.
            'targets': {
                'source': {'kind': 'python_source', 'split': 'train'},
                'batch_size': 512,
                'max_new_tokens': 192,
                'keep_unfinished': True,  # a pretrained model seldom ends a text
                'prompt_multiple': 64,
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 32,
                'row_length': 512,
                'workers': 4,  # processes that make batches; 0: a thread
            },
            'drafting': {
                'weights': 'accepted_length',
                'smoothing': 0.5,
                'anchors_per_row': 64,
                'refused_rate': 0.0,
                'total_variation': 0.0,
                'lookup_ngram': 2,  # where a lookup drafts no canvas is trained
                'held_out': 256,
            },
            'corruption': 'masked',
            'ar_weight': 0.0,  # the encode pass is frozen
            'optimizer': {
                'learning_rate': 6e-4,
                'warmup_steps': 100,
                'weight_decay': 0.0,
                'ema_decay': 0.999,
            },
            'train': {'num_steps': 5_000, 'report_every': 50, 'checkpoint_every': 500},
            'sampling': {
                'max_new_tokens': 96,
                'temperature': 0.0,
                'lookup_ngram': 2,  # code repeats itself
            },
            'eval': {
                'source': {'kind': 'human_eval'},
                'batch_size': 41,
                'speed_batch_sizes': (1, 8),
                'speed_batches': 8,
                'prompt_multiple': 64,
            },
        }
    )
