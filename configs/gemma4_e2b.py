r"""Turns Gemma 4 E2B into a diffusion student of its own autoregressive weights.

Meant for eight GPUs with 80 GB in one machine. TEACHER is the directory of the downloaded
google/gemma-4-E2B-it (config.json, safetensors and tokenizer.model); TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill \
    --config=configs/gemma4_e2b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per device, computed from parameter counts and shapes and not measured:

  4.657B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 8 9.3 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 8           3.5 GB
  logits, about 4 per row token and 7 per canvas token of 262,144 x 4
    bytes: 1 row x (4 x 1024 + 7 x 768) x 1.05 MB                           9.9 GB
  activations of 35 layers, 4.4 MB a token: 1024 + 2 x 768 tokens          11.3 GB
  attention weights                                                         8.5 GB
  together                                                                 42.5 GB

Half of the parameters (2.35B) are per-layer embeddings, which are trained and sharded too.

Learning rate and number of steps are starting points: nobody has tuned them.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            # All parameters lie in eighths; the state does not fit one device.
            'mesh': {'fsdp': 8},
            'canvas_length': 128,  # a paragraph; half of the released denoiser's
            # Stage 0: the teacher answers these prompts; the student learns its answers. A TFDS
            # dataset is {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'max_new_tokens': 768,  # the canvases of a row
            },
            'data': {
                'batch_size': 8,  # rows, one a device; a second one would leave no room
                'row_length': 1024,
                'canvases_per_row': 6,  # 768 tokens: three quarters of a row are responses
                # Some canvases start inside a response, as where a decoder was cut short.
                'random_offset_rate': 0.1,
            },
            # The sampler's own trajectories once single steps are learned.
            'stage2': {'first_step': 6_000},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 3e-5,
                'warmup_steps': 300,  # Adam's second moments need them
            },
            'train': {
                'num_steps': 10_000,
                'checkpoint_every': 1_000,  # 75 GB each: parameters, EMA, moments
            },
            'sampling': {'max_new_tokens': 768, 'max_denoising_steps': 32, 'temperature': 0.0},
            'eval': {
                # Responses count as right where they are TEST's to the letter: short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 48),
                },
            },
        }
    )
