"""Measures a distillation step with all canvases or one, and with or without a layer loop.

    python benchmarks/distillation_step.py --depths=6,30

It uses random students of the shipped teacher's width on packed rows of word problems in stage 1.
The table has seconds to trace and compile (the minimum of two measurements), median milliseconds of
a step, response tokens trained per second, and their ratio to the previous row with quartiles. It
compares all canvases of every response with one canvas of each (with the same encode pass), then
layers in a loop with unrolled layers, at each depth. The last line is JSON.
"""

import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from timing import seconds, spread

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.pipeline import make_train_iterator
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.diffusion.corruption import UniformCorruption
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.state import OptimizerConfig, create_state, make_optimizer
from diffusiongemma.distillation.step import Constants, make_distillation_step
from diffusiongemma.models import DiffusionGemma, Gemma, ModelConfig, init_params
from diffusiongemma.models.execution import Execution
from diffusiongemma.sampling import TemperatureSchedule

_DEPTHS = flags.DEFINE_list('depths', ['6', '30'], 'Layers, multiples of six.')
_CANVAS = flags.DEFINE_integer('canvas', 16, 'Canvas length.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Rows of 256 tokens.', lower_bound=1)
_REPETITIONS = flags.DEFINE_integer('repetitions', 7, 'Timed steps.', lower_bound=2)

PATTERN = ('sliding',) * 5 + ('full',)  # the layer pattern of the published models


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the table."""

    depth: int
    one_canvas: bool
    scan_layers: bool


def batch_of(tokenizer: Any, one_canvas: bool) -> dict[str, np.ndarray]:
    """Returns a packed batch; with one canvas per document it has one slot per document."""
    return next(
        make_train_iterator(
            DataSpec(kind='wordmath', size=1000),
            tokenizer,
            batch_size=_BATCH_SIZE.value,
            row_length=256,
            canvases_per_row=4 if one_canvas else -(-160 // _CANVAS.value),
            canvas_length=_CANVAS.value,
            seed=0,
            one_canvas=one_canvas,
        )
    )


def measure(base: ModelConfig, tokenizer: Any, setting: Setting) -> dict[str, Any]:
    """Returns compile seconds, seconds of each step [repetitions], and response tokens."""
    config = base.replace(
        layer_types=PATTERN * (setting.depth // len(PATTERN)),
        canvas_length=_CANVAS.value,
    )
    execution = Execution(scan_layers=setting.scan_layers)
    model = DiffusionGemma(config, execution=execution)
    teacher = Gemma(config.autoregressive, execution=execution)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 1000)
    step = make_distillation_step(
        model,
        teacher,
        Stage1(corruption=UniformCorruption(config.vocab_size), schedule=TemperatureSchedule()),
        optimizer,
        ar_weight=0.1,
        ema_decay=0.99,
        seed=0,
    )
    batch = jax.device_put(batch_of(tokenizer, setting.one_canvas))
    state = create_state(init_params(model, jax.random.key(0)), optimizer)
    constants = Constants(init_params(teacher, jax.random.key(1)), {})
    compile_seconds = []
    for _ in range(2):
        jax.clear_caches()  # otherwise the second measurement would use the cache of the first
        start = time.perf_counter()
        compiled = jax.jit(step).lower(state, constants, batch).compile()
        compile_seconds.append(time.perf_counter() - start)
    inside = np.asarray(batch['canvas_tokens']) != tokenizer.pad_id
    used = inside & (np.asarray(batch['canvas_segment_ids']) > 0)[..., None]
    times = seconds(lambda: compiled(state, constants, batch), _REPETITIONS.value)
    return {'compile_s': min(compile_seconds), 'times': times, 'tokens': int(used.sum())}


def main(argv: list[str]) -> None:
    del argv
    jax.config.update('jax_enable_compilation_cache', False)  # compile times are measured
    teacher, _, tokenizer = load_model('builtin-teacher')
    depths = [int(value) for value in _DEPTHS.value]
    if any(depth <= 0 or depth % len(PATTERN) for depth in depths):
        raise ValueError(f'--depths must be multiples of six, got {depths}.')
    settings = [Setting(depths[0], one, True) for one in (True, False)]
    settings += [Setting(depth, False, scan) for depth in depths for scan in (False, True)]
    table = Table('layers', 'canvases', 'loop', 'compile s', 'ms', 'tok/s', 'ratio (quartiles)')
    results: list[dict[str, Any]] = []
    for i, setting in enumerate(settings):
        measured = measure(teacher.config, tokenizer, setting)
        speeds = measured['tokens'] / measured['times']
        ratio = spread(speeds / np.median(results[-1]['speeds'])) if i % 2 else ''
        results.append(
            dataclasses.asdict(setting)
            | {'compile_s': measured['compile_s'], 'speeds': speeds.tolist()}
        )
        table.add_row(
            str(setting.depth),
            'one' if setting.one_canvas else 'all',
            'yes' if setting.scan_layers else 'no',
            f'{measured["compile_s"]:.1f}',
            f'{1e3 * np.median(measured["times"]):,.0f}',
            f'{np.median(speeds):,.0f}',
            ratio,
        )
    Console().print(table)
    print(json.dumps(results))


if __name__ == '__main__':
    cli.run_main(main)
