r"""Turns Gemma 3 1B into a diffusion student of its own autoregressive weights.

Meant for eight GPUs with 80 GB in one machine. TEACHER is the directory of the downloaded
google/gemma-3-1b-it (config.json, safetensors and tokenizer.model); TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill \
    --config=configs/gemma3_1b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per device, computed from parameter counts and shapes and not measured:

  1.024B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 8 2.0 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 8           0.8 GB
  logits, about 4 per row token and 7 per canvas token of 262,144 x 4
    bytes: 2 rows x (4 x 1024 + 7 x 768) x 1.05 MB                         19.9 GB
  activations of 26 layers, 2.3 MB a token: 2 x (1024 + 2 x 768) tokens    11.8 GB
  attention weights                                                         6.3 GB
  together                                                                 40.8 GB

Learning rate and number of steps are starting points: nobody has tuned them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'seed': 0,
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            # The state would fit one device, not with logits beside it that are worth a batch.
            'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1, 'expert': 1, 'sequence': 1},
            # Memory against time, see docs/scaling.md; these defaults keep all.
            'compute': {'remat': 'none', 'logits_chunk': 0, 'query_block': 0, 'microbatches': 1},
            'teacher': '',  # given on the command line
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            'denoise_dtype': 'bfloat16',
            'canvas_length': 64,  # a sentence or two
            'predict_next': True,  # what the teacher has learnt holds from the first step on
            'denoiser': 'shared',  # one set of layers for both passes, as the released model
            'self_conditioning': True,  # a step sees what the step before believed
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'both'},  # rank 0: train all layers
            # Stage 0: the teacher answers these prompts; the student learns its answers. A TFDS
            # dataset is {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 256,
                'max_new_tokens': 768,  # the canvases of a row
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 16,  # rows, two a device
                'row_length': 1024,
                'canvases_per_row': 12,  # 768 tokens: three quarters of a row are responses
                # Some canvases start inside a response, as where a decoder was cut short.
                'random_offset_rate': 0.1,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'corruption': 'uniform',
            'ar_weight': 0.1,  # keeps the encode pass at the teacher: its weights are trained too
            'stage1': {'kd_weight': 1.0, 'self_conditioning_rate': 0.5},
            # The sampler's own trajectories once single steps are learnt.
            'stage2': {'first_step': 6_000, 'num_steps': 2, 'all_noise_rate': 0.5},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 5e-5,
                'warmup_steps': 300,  # Adam's second moments need them
                'ema_decay': 0.999,
            },
            'train': {
                'num_steps': 10_000,
                'report_every': 20,
                'checkpoint_every': 1_000,  # 16 GB each: parameters, EMA, moments
                'max_to_keep': 2,
            },
            'sampling': {
                'max_new_tokens': 768,
                'max_denoising_steps': 32,
                'temperature': 0.0,
            },
            'eval': {
                # Responses count as right where they are TEST's to the letter: short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 32,
                'speed_batch_sizes': (1, 8),
                'speed_batches': 24,
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (2, 4, 16),
                    'canvas_length': (),
                },
            },
        }
    )
