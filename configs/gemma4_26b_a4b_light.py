r"""Trains a light denoiser that drafts for a frozen Gemma 4 26B-A4B.

Meant for four TPU v6e with 32 GB (topology 2x2). The teacher is never trained, so that its state is
its 51 GB of bfloat16 weights and nothing else; five dense layers of its width learn to draft what
it will write next. TEACHER is the directory of the downloaded google/gemma-4-26B-A4B-it; TRAIN and
TEST are JSONL files with {"prompt": "...", "response": "..."} in each line.

  python -m diffusiongemma.distill \
    --config=configs/gemma4_26b_a4b_light.py --workdir=DIR --config.teacher=TEACHER \
    --config.targets.source.path=TRAIN --config.eval.source.path=TEST

docs/scaling_plan.md says what the TPU compiler makes of it: memory, rows and hours at the least.
Nobody has run it or tuned it: layers, vocabulary and learning rate are starting points.
"""

from ml_collections import ConfigDict

from diffusiongemma.distillation.experiment import experiment_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            'dtype': 'bfloat16',  # of the computation; the state of training is float32
            'mesh': {'expert': 4},  # tokens travel, experts do not
            'compute': {'logits_chunk': 512, 'query_block': 256},
            'denoiser': 'light',
            'light': {
                'layers': (2, 9, 16, 23, 29),  # of the teacher's 30; the last one sees all tokens
                'draft_vocab_size': 32_768,  # of 262,144; the verifier scores all
                'serial_rank': 256,
            },
            'canvas_length': 16,
            'self_conditioning': False,  # drafts take one step, which has none before it
            'targets': {
                'source': {'kind': 'jsonl', 'path': 'train.jsonl'},
                'max_new_tokens': 768,
            },
            'data': {'batch_size': 16, 'row_length': 1024},
            'drafting': {'anchors_per_row': 64, 'lookup_ngram': 2},
            'corruption': 'masked',
            'optimizer': {
                'learning_rate': 6e-4,
                'warmup_steps': 200,
                'weight_decay': 0.0,
                'ema_decay': 0.999,
            },
            'train': {'num_steps': 20_000, 'checkpoint_every': 1_000},
            'sampling': {'max_new_tokens': 768, 'temperature': 0.0, 'lookup_ngram': 2},
            'eval': {
                'source': {'kind': 'jsonl', 'path': 'test.jsonl', 'size': 256},
                'batch_size': 32,
            },
        }
    )
