r"""Turns Gemma 4 E2B into a diffusion student of its own autoregressive weights.

Meant for eight GPUs with 80 GB in one machine. TEACHER is the directory of the downloaded
google/gemma-4-E2B-it (config.json, safetensors and tokenizer.model); TRAIN and TEST are JSONL
files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill \
    --config=configs/gemma4_e2b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per device, computed from parameter counts and shapes, not measured:

  4.657B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 8 9.3 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 8           3.5 GB
  logits, about 4 per row token and 7 per canvas token of 262,144 x 4
    bytes: 1 row x (4 x 1024 + 7 x 768) x 1.05 MB                           9.9 GB
  activations of 35 layers, 4.4 MB a token: 1024 + 2 x 768 tokens          11.3 GB
  attention weights                                                         8.5 GB
  together                                                                 42.5 GB

Half of the parameters (2.35B) are per-layer embeddings, which are trained and sharded too.

The learning rate and the number of steps are untuned starting points.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # for the computation; the training state is float32
            # Each parameter is split into eighths, since the state does not fit one device.
            'mesh': {'fsdp': 8},
            'canvas_length': 128,  # a paragraph; half the released denoiser's length
            # Stage 0: the teacher answers these prompts, and the student learns its answers. A TFDS
            # dataset: {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'max_new_tokens': 768,  # as many as the canvases of a row hold
            },
            'data': {
                'batch_size': 8,  # rows, one per device; a second one would not fit
                'row_length': 1024,
                'canvases_per_row': 6,  # 768 tokens: three quarters of a row may be responses
                # Some canvases start inside a response, as after a canvas that was cut short.
                'random_offset_rate': 0.1,
            },
            # Training on the sampler's own trajectories starts after single steps are learned.
            'stage2': {'first_step': 6_000},
            'optimizer': {
                # Lower than in pretraining, so that the weights stay close to the teacher's.
                'learning_rate': 3e-5,
                'warmup_steps': 300,  # Adam's second moments need these steps
            },
            'train': {
                'num_steps': 10_000,
                'checkpoint_every': 1_000,  # 75 GB each: parameters, EMA and moments
            },
            'sampling': {'max_new_tokens': 768, 'max_denoising_steps': 32, 'temperature': 0.0},
            'eval': {
                # A response is correct if it equals TEST's exactly, so use short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 48),
                },
            },
        }
    )
