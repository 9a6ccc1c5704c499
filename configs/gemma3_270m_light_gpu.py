"""Trains a light denoiser that drafts for the pretrained Gemma 3 270M.

Meant for one GPU with 80 GB, with a target of 12 minutes: the teacher continues all 10,000 windows
of the Python standard library's training files, then six draft layers are trained on them.
configs/gemma3_270m_light.py is the version for 2 CPU cores, which takes hours.

  XLA_PYTHON_CLIENT_MEM_FRACTION=.9 python -m diffusiongemma.distill \
    --config=configs/gemma3_270m_light_gpu.py --workdir=DIR

It has not been run on a GPU yet. Its step, compiled for a CPU, takes 36 GB.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ON_CPU = Path(__file__).with_name('gemma3_270m_light.py')


def get_config() -> ConfigDict:
    config = runpy.run_path(str(ON_CPU))['get_config']()
    config.dtype = 'bfloat16'  # for the computation; the training state is float32
    config.light.update({'layers': (0, 1, 5, 11, 16, 17), 'serial_rank': 256})
    config.canvas_length = 16
    config.targets.update({'batch_size': 512, 'max_new_tokens': 192})
    del config.targets.source.size  # all windows
    config.data.update({'batch_size': 32, 'workers': 4})
    # The teacher's texts suffice here, so canvases start in these alone.
    config.drafting.update({'prompts': False, 'anchors_per_row': 64, 'held_out': 256})
    config.optimizer.update({'learning_rate': 6e-4, 'warmup_steps': 100, 'ema_decay': 0.999})
    config.train = {'num_steps': 5_000, 'report_every': 50, 'checkpoint_every': 500}
    del config.sampling.draft_length, config.sampling.model_draft_length  # drafts fill the canvas
    return config
