r"""Turns Gemma 4 26B-A4B into a diffusion student of its own autoregressive weights.

Meant for a v5p-128 slice: 64 TPU v5p with 95 GB, topology 4x4x4, the default of launch/tpu_vm.sh
and launch/gke_xpk.sh, which run this on all of its hosts. TEACHER is the directory of the
downloaded google/gemma-4-26B-A4B-it (config.json, safetensors and tokenizer.model); TRAIN and TEST
are JSONL files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill --distributed \
    --config=configs/gemma4_26b_a4b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory of a chip: state, gradients and teacher computed from shapes, all of it by the TPU compiler
(docs/scaling_plan.md has the command):

  25.25B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 64 6.3 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 64           2.4 GB
  together with all else that a step takes                                17.8 GB

A step takes at least 0.77 s of products and, in part beside them, 0.63 s of the interconnect, by
the same plan at published peaks; not measured. It reads 64 rows of 1,024 tokens, of which at most
768 are a response: 5,000 steps are 246M response tokens and 64 minutes at the least.

Eight GPUs with 80 GB hold the state (57 GB each) and not the step; adapters alone are trained there
with --config.lora.rank=16 --config.mesh.expert=1 --config.data.batch_size=8.
Export and the teacher's fingerprint pass through the host: 256 GB of its memory.

Learning rate and number of steps are starting points: nobody has tuned them.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            # Tokens are exchanged along expert; fsdp alone would gather each layer's experts, which
            # takes longer than its products.
            'mesh': {'fsdp': 8, 'expert': 8},
            # Memory against time, see docs/scaling.md. Chunks of logits are nearly free.
            'compute': {'remat': 'full', 'logits_chunk': 256, 'query_block': 256},
            # As the released denoiser, so that convert --format=hf can write the student.
            'canvas_length': 256,
            'predict_next': False,
            # Stage 0: the teacher answers these prompts; the student learns its answers. A TFDS
            # dataset is {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'max_new_tokens': 768,  # the canvases of a row
            },
            'data': {
                'batch_size': 64,  # rows, one a chip; there is room for more
                'row_length': 1024,
                'canvases_per_row': 3,  # 768 tokens: three quarters of a row are responses
                # Some canvases start inside a response, as where a decoder was cut short.
                'random_offset_rate': 0.1,
            },
            # The sampler's own trajectories once single steps are learned.
            'stage2': {'first_step': 3_000},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 1e-5,
                'warmup_steps': 200,  # Adam's second moments need them
            },
            'train': {
                'num_steps': 5_000,
                'checkpoint_every': 500,  # 404 GB each: parameters, EMA, moments
                'max_to_keep': 1,
            },
            'sampling': {'max_new_tokens': 768},
            'eval': {
                # Responses count as right where they are TEST's to the letter: short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 64,
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 48),
                },
            },
        }
    )
