r"""Turns Gemma 4 26B-A4B into a diffusion student of its own autoregressive weights.

Meant for eight GPUs with 141 GB in one machine. TEACHER is the directory of the downloaded
google/gemma-4-26B-A4B-it (config.json, safetensors and tokenizer.model); TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python -m diffusiongemma.distill \
    --config=configs/gemma4_26b_a4b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per device, computed from parameter counts and shapes and not measured:

  25.25B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 8 50.5 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 8          18.9 GB
  one layer's experts gathered, bfloat16, and their gradients in float32    4.6 GB
  logits of 256 positions, about 7 arrays of 262,144 x 4 bytes each:
    1 row x 256 x 7 x 1.05 MB                                               1.9 GB
  activations of 30 layers, 6.6 MB a token: 1024 + 2 x 768 tokens          16.9 GB
  attention weights                                                        14.6 GB
  together                                                                107.4 GB

Eight devices with 80 GB hold the state and no batch; --config.lora.rank=16 trains adapters alone.
Export and the teacher's fingerprint pass through the host: 256 GB of its memory.

Learning rate and number of steps are starting points: nobody has tuned them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'seed': 0,
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            # fsdp gathers each layer's experts; expert: 8 would exchange tokens in their place.
            'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1, 'expert': 1, 'sequence': 1},
            # Memory against time, see docs/scaling.md. Chunks of logits are nearly free.
            'compute': {'remat': 'none', 'logits_chunk': 256, 'query_block': 0, 'microbatches': 1},
            'teacher': '',  # given on the command line
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            # As the released denoiser, so that convert --format=hf can write the student.
            'denoise_dtype': 'bfloat16',
            'canvas_length': 256,
            'predict_next': False,
            'separate_denoiser': False,  # one set of layers for both passes, as the released model
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'both'},  # rank 0: train all layers
            # Stage 0: the teacher answers these prompts; the student learns its answers. A TFDS
            # dataset is {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 128,
                'max_new_tokens': 768,  # the canvases of a row
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 8,  # rows, one a device; a second one would leave no room
                'row_length': 1024,
                'canvases_per_row': 3,  # 768 tokens: three quarters of a row are responses
                # Some canvases start inside a response, as where a decoder was cut short.
                'random_offset_rate': 0.1,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'corruption': 'uniform',
            'ar_weight': 0.1,  # keeps the encode pass at the teacher: its weights are trained too
            'stage1': {'kd_weight': 1.0, 'self_conditioning_rate': 0.5},
            # The sampler's own trajectories once single steps are learnt.
            'stage2': {'first_step': 12_000, 'num_steps': 2, 'all_noise_rate': 0.5},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 1e-5,
                'warmup_steps': 500,  # Adam's second moments need them
                'ema_decay': 0.999,
            },
            'train': {
                'num_steps': 20_000,
                'report_every': 20,
                'checkpoint_every': 2_000,  # 404 GB each: parameters, EMA, moments
                'max_to_keep': 1,
            },
            'sampling': {
                'max_new_tokens': 768,
                'max_denoising_steps': 48,
                'entropy_bound': 0.1,
                'temperature': 1.0,
            },
            'eval': {
                # Responses count as right where they are TEST's to the letter: short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 16,
                'speed_batch_sizes': (1, 8),
                'speed_batches': 24,
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 48),
                    'canvas_length': (),
                },
            },
        }
    )
