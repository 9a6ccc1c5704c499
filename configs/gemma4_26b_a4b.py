r"""Turns Gemma 4 26B-A4B into a diffusion student of its own autoregressive weights.

Meant for a v5p-128 slice: 64 TPU v5p with 95 GB, topology 4x4x4, the default of launch/tpu_vm.sh
and launch/gke_xpk.sh, which run this on all of its hosts. TEACHER is the directory of the
downloaded google/gemma-4-26B-A4B-it (config.json, safetensors and tokenizer.model); TRAIN and TEST
are JSONL files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill --distributed \
    --config=configs/gemma4_26b_a4b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory of a chip: state, gradients and teacher computed from shapes, all of it by the TPU compiler
(docs/scaling_plan.md has the command; 64 chips with fsdp 64 need 36.4 GB, 32 chips 50.8 GB, and
eight are too few at 164 GB):

  25.25B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 64 6.3 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 64           2.4 GB
  together with all else that a step takes                                29.8 GB

A step takes at least 0.77 s of products and, in part beside them, 0.51 s of the interconnect, by
the same plan at published peaks; not measured. It reads 64 rows of 1,024 tokens, of which at most
768 are a response: 5,000 steps are 246M response tokens and 64 minutes at the least.

Eight GPUs with 80 GB hold the state (57 GB each) and not the step; adapters alone are trained there
with --config.lora.rank=16 --config.mesh.expert=1 --config.data.batch_size=8.
Export and the teacher's fingerprint pass through the host: 256 GB of its memory.

Learning rate and number of steps are starting points: nobody has tuned them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'seed': 0,
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            # Tokens are exchanged along expert; fsdp alone would gather each layer's experts, which
            # takes longer than its products.
            'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1, 'expert': 8, 'sequence': 1},
            # Memory against time, see docs/scaling.md. Chunks of logits are nearly free.
            'compute': {
                'remat': 'full',
                'logits_chunk': 256,
                'query_block': 256,
                'microbatches': 1,
            },
            'teacher': '',  # given on the command line
            'init': '',  # a student to go on from; empty: starts from the teacher's weights
            # As the released denoiser, so that convert --format=hf can write the student.
            'denoise_dtype': 'bfloat16',
            'canvas_length': 256,
            'predict_next': False,
            'denoiser': 'shared',  # one set of layers for both passes, as the released model
            'self_conditioning': True,  # a step sees what the step before believed
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
                'batch_size': 64,  # rows, one a chip; there is room for more
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
            'stage2': {'first_step': 3_000, 'num_steps': 2, 'all_noise_rate': 0.5},
            'optimizer': {
                # Below what such a model was trained with, since its weights are to be kept.
                'learning_rate': 1e-5,
                'warmup_steps': 200,  # Adam's second moments need them
                'ema_decay': 0.999,
            },
            'train': {
                'num_steps': 5_000,
                'report_every': 20,
                'checkpoint_every': 500,  # 404 GB each: parameters, EMA, moments
                'max_to_keep': 1,
            },
            'sampling': {
                'max_new_tokens': 768,
                'max_denoising_steps': 48,
                'temperature': 1.0,
            },
            'eval': {
                # Responses count as right where they are TEST's to the letter: short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 64,
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
