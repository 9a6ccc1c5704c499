r"""Turns Gemma 3 270M into a diffusion student of its own autoregressive weights.

Meant for one GPU with 24 GB or more. TEACHER is the directory of the downloaded
google/gemma-3-270m-it (config.json, safetensors and tokenizer.model); TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  XLA_PYTHON_CLIENT_MEM_FRACTION=.9 python -m diffusiongemma.distill \
    --config=configs/gemma3_270m.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per device, computed from parameter counts and shapes, not measured:

  0.272B trained x 16 bytes (float32 parameters, EMA, two Adam moments)     4.4 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes               1.6 GB
  logits, about 7 per position of 262,144 x 4 bytes, for 64 positions of
    each row at a time: 8 rows x 64 x 7 x 1.05 MB                           3.8 GB
  activations of 18 layers, 0.7 MB a token: 8 x (512 + 2 x 384) tokens      7.2 GB
  attention weights                                                         2.1 GB
  together                                                                 19.1 GB

With --config.compute.logits_chunk=0 all logits (39.7 GB) are kept and none is computed twice; the
total of 55.0 GB needs a GPU with 80 GB. On a GPU with 40 GB, --config.data.batch_size=16 and
--config.compute.logits_chunk=32 take 28.4 GB. The learning rate and the number of steps are untuned
starting points.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # for the computation; the training state is float32
            'compute': {'logits_chunk': 64},  # see the docstring
            'canvas_length': 32,  # a small model predicts few tokens at once with confidence
            # Stage 0: the teacher answers these prompts, and the student learns its answers. A TFDS
            # dataset: {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 256,
                'max_new_tokens': 384,  # as many as the canvases of a row hold
            },
            'data': {
                'batch_size': 8,  # rows; see the docstring
                'row_length': 512,  # several short conversations
                'canvases_per_row': 12,  # 384 tokens: three quarters of a row may be responses
                # Some canvases start inside a response, as after a canvas that was cut short.
                'random_offset_rate': 0.1,
            },
            # Training on the sampler's own trajectories starts after single steps are learned.
            'stage2': {'first_step': 3_000},
            'optimizer': {
                # Lower than in pretraining, so that the weights stay close to the teacher's.
                'learning_rate': 1e-4,
                'warmup_steps': 200,  # Adam's second moments need these steps
            },
            'train': {
                'num_steps': 5_000,
                'checkpoint_every': 500,  # 4 GB each: parameters, EMA and moments
            },
            'sampling': {'max_new_tokens': 384, 'max_denoising_steps': 16, 'temperature': 0.0},
            'eval': {
                # A response is correct if it equals TEST's exactly, so use short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (2, 4, 16),
                },
            },
        }
    )
