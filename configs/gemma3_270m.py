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

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            'compute': {'logits_chunk': 64},  # see above
            'canvas_length': 32,  # a small model is sure of few tokens at once
            # Stage 0: the teacher answers these prompts; the student learns its answers. A TFDS
            # dataset is {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'batch_size': 256,
                'max_new_tokens': 384,  # the canvases of a row
            },
            'data': {
                'batch_size': 8,  # rows; see above
                'row_length': 512,  # several short conversations
                'canvases_per_row': 12,  # 384 tokens: three quarters of a row are responses
                # Some canvases start inside a response, as where a decoder was cut short.
                'random_offset_rate': 0.1,
            },
            # The sampler's own trajectories once single steps are learned.
            'stage2': {'first_step': 3_000},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 1e-4,
                'warmup_steps': 200,  # Adam's second moments need them
            },
            'train': {
                'num_steps': 5_000,
                'checkpoint_every': 500,  # 4 GB each: parameters, EMA, moments
            },
            'sampling': {'max_new_tokens': 384, 'max_denoising_steps': 16, 'temperature': 0.0},
            'eval': {
                # Responses count as right where they are TEST's to the letter: short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (2, 4, 16),
                },
            },
        }
    )
