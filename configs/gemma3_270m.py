r"""Turns Gemma 3 270M into a diffusion student of its own autoregressive weights.

Meant for one GPU with 24 GB or more. TEACHER is the directory of the downloaded
google/gemma-3-270m-it (config.json, safetensors and tokenizer.model); TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  XLA_PYTHON_CLIENT_MEM_FRACTION=.9 python -m diffusiongemma.distill \
    --config=configs/gemma3_270m.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per device, computed from parameter counts and shapes and not measured:

  0.272B trained x 16 bytes (float32 parameters, EMA, two Adam moments)     4.4 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes               1.6 GB
  logits, about 7 per position of 262,144 x 4 bytes, of 64 positions of
    each row at a time: 8 rows x 64 x 7 x 1.05 MB                           3.8 GB
  activations of 18 layers, 0.7 MB a token: 8 x (512 + 2 x 384) tokens      7.2 GB
  attention weights                                                         2.1 GB
  together                                                                 19.1 GB

With --config.compute.logits_chunk=0 all logits are kept, 39.7 GB of them, and none is computed
twice: 55.0 GB, for a GPU with 80 GB. On 40 GB --config.data.batch_size=16 and
--config.compute.logits_chunk=32 take 28.4 GB. Learning rate and number of steps are starting
points: nobody has tuned them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'seed': 0,
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            # The state fits one device; more devices take more rows.
            'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'expert': 1, 'sequence': 1},
            # Memory against time, see docs/scaling.md.
            'compute': {'remat': 'none', 'logits_chunk': 64, 'query_block': 0, 'microbatches': 1},
            'teacher': '',  # given on the command line
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            'denoise_dtype': 'bfloat16',
            'canvas_length': 32,  # a small model is sure of few tokens at once
            'predict_next': True,  # what the teacher has learnt holds from the first step on
            'denoiser': 'shared',  # one set of layers for both passes, as the released model
            'self_conditioning': True,  # a step sees what the step before believed
            'lora': {'rank': 0, 'alpha': 16.0, 'passes': 'both'},  # rank 0: train all layers
            # Stage 0: the teacher answers these prompts; the student learns its answers. A TFDS
            # dataset is {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 256,
                'max_new_tokens': 384,  # the canvases of a row
                'sequence_level': True,
                'top_k_logits': 0,  # or k: no teacher in memory while training
            },
            'data': {
                'batch_size': 8,  # rows; see above
                'row_length': 512,  # several short conversations
                'canvases_per_row': 12,  # 384 tokens: three quarters of a row are responses
                # Some canvases start inside a response, as where a decoder was cut short.
                'random_offset_rate': 0.1,
                'workers': 0,  # processes that make batches; 0: a thread
            },
            'corruption': 'uniform',
            'ar_weight': 0.1,  # keeps the encode pass at the teacher: its weights are trained too
            'stage1': {'kd_weight': 1.0, 'self_conditioning_rate': 0.5},
            # The sampler's own trajectories once single steps are learnt.
            'stage2': {'first_step': 3_000, 'num_steps': 2, 'all_noise_rate': 0.5},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 1e-4,
                'warmup_steps': 200,  # Adam's second moments need them
                'ema_decay': 0.999,
            },
            'train': {
                'num_steps': 5_000,
                'report_every': 20,
                'checkpoint_every': 500,  # 4 GB each: parameters, EMA, moments
                'max_to_keep': 2,
            },
            'sampling': {
                'max_new_tokens': 384,
                'max_denoising_steps': 16,
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
