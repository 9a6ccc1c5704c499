r"""Turns Gemma 4 26B-A4B into a diffusion student of its own autoregressive weights.

Meant for a v5p-128 slice: 64 TPU v5p with 95 GB, topology 4x4x4, the default of launch/tpu_vm.sh
and launch/gke_xpk.sh, which run this command on all of its hosts. TEACHER is the directory of the
downloaded google/gemma-4-26B-A4B-it (config.json, safetensors and tokenizer.model); TRAIN and TEST
are JSONL files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill --distributed \
    --config=configs/gemma4_26b_a4b.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

Memory per chip. State, gradients and teacher are computed from shapes; the total comes from the TPU
compiler (docs/scaling_plan.md has the command), without the code of the program:

  25.25B trained x 16 bytes (float32 parameters, EMA, two Adam moments) / 64 6.3 GB
  gradients in float32 and the teacher in bfloat16, x 6 bytes / 64           2.4 GB
  everything that a step needs                                              21.8 GB

By the same plan, at published peak rates and not measured, a step takes at least 0.77 s of matmuls
and 0.55 s of communication, which partly overlap. It reads 64 rows of 1,024 tokens, of which at
most 768 are a response: 5,000 steps are 246M response tokens and at least 64 minutes.

Smaller slices hold the step too: eight v5p, or sixteen v6e with Adafactor and without an average
(docs/scaling_plan.md). Eight GPUs with 80 GB hold the state (57 GB each) but not a step of full
training; they can train adapters with
--config.lora.rank=16 --config.mesh.expert=1 --config.data.batch_size=8.
The export and the teacher's fingerprint need 256 GB of host memory.

The learning rate and the number of steps are untuned starting points.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # for the computation; the training state is float32
            # Tokens are exchanged along `expert`; fsdp alone would gather the experts of a layer,
            # which takes longer than the layer's matmuls.
            'mesh': {'fsdp': 8, 'expert': 8},
            # These save memory and cost time (docs/scaling.md); chunks of logits cost almost none.
            'compute': {'remat': 'full', 'logits_chunk': 256, 'query_block': 256},
            # As in the released denoiser, so that convert --format=hf can write the student.
            'canvas_length': 256,
            'predict_next': False,
            # Stage 0: the teacher answers these prompts, and the student learns its answers. A TFDS
            # dataset: {'kind': 'tfds', 'name': ..., 'split': 'train', 'prompt_feature': ...}.
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'max_new_tokens': 768,  # as many as the canvases of a row hold
            },
            'data': {
                'batch_size': 64,  # rows, one per chip; there is memory for more
                'row_length': 1024,
                'canvases_per_row': 3,  # 768 tokens: three quarters of a row may be responses
                # Some canvases start inside a response, as after a canvas that was cut short.
                'random_offset_rate': 0.1,
            },
            # Training on the sampler's own trajectories starts after single steps are learned.
            'stage2': {'first_step': 3_000},
            'optimizer': {
                # Lower than in pretraining, so that the weights stay close to the teacher's.
                'learning_rate': 1e-5,
                'warmup_steps': 200,  # Adam's second moments need these steps
            },
            'train': {
                'num_steps': 5_000,
                'checkpoint_every': 500,  # 404 GB each: parameters, EMA and moments
                'max_to_keep': 1,
            },
            'sampling': {'max_new_tokens': 768},
            'eval': {
                # A response is correct if it equals TEST's exactly, so use short answers.
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 64,
                'sweep': {
                    'entropy_bound': (0.02, 0.1, 0.5),
                    'max_denoising_steps': (4, 16, 48),
                },
            },
        }
    )
