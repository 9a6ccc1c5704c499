r"""Computes a lower bound of the time of each pass on a device, and measures the passes here.

    python benchmarks/roofline.py --preset=diffusiongemma_26b_a4b --device=H200 --prefix=4096
    python benchmarks/roofline.py --checkpoint=builtin

For every pass of the sampler it counts the FLOPs of matmuls and the bytes that must be
moved between memory and processor (weights once, only those experts that tokens are routed to, the
K/V cache, logits), and prints the longer of the two times at the device's peaks. A checkpoint, or a
`--preset` with `--random_weights`, is also run on the first local device, and the measured time is
divided by the bound. For the full 26B-A4B on one H200:

    python benchmarks/roofline.py --preset=diffusiongemma_26b_a4b --random_weights --device=H200 \
        --prefix=4096

The peaks of a CPU are measured: the speed of a large matmul, and the bandwidth of the product of a
vector with a matrix as large as the weights (small matrices stay in the cache). Peaks are the best
of several measurements, passes the median; they are measured in turns.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from rich.console import Console
from rich.table import Table
from timing import pass_programs, seconds_in_turns

from diffusiongemma import cli
from diffusiongemma.accounting.devices import figures_named
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.models import (
    PRESETS,
    DiffusionGemma,
    ModelConfig,
    cache_bytes,
    for_inference,
    parameter_counts,
    quantize_weights,
)
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.inference import WEIGHT_DTYPES
from diffusiongemma.sampling import Controls, SamplingConfig
from diffusiongemma.sampling.sampler import prefilled

_PRESET = flags.DEFINE_string('preset', None, 'A model of diffusiongemma.models.PRESETS.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A diffusion student to measure.')
_RANDOM_WEIGHTS = flags.DEFINE_bool('random_weights', False, 'Measure the preset too.')
_DEVICE = flags.DEFINE_string(
    'device',
    None,
    'v5e, v5p, v6e, H100, ...; the default is the local device, whose peaks are measured.',
)
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Dtype of weights and matmuls.')
_WEIGHTS = flags.DEFINE_enum(
    'weights',
    None,
    sorted(WEIGHT_DTYPES),
    'Store the weights of layers in eight bits; matmuls use --dtype.',
)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 1, 'Rows.', lower_bound=1)
_PREFIX = flags.DEFINE_integer(
    'prefix', 128, 'Number of cached tokens before the canvas.', lower_bound=1
)
_CANVAS = flags.DEFINE_integer(
    'canvas', 0, 'Canvas length; 0 for that of the model.', lower_bound=0
)
_STEPS = flags.DEFINE_integer('steps', 16, 'Denoise steps per canvas.', lower_bound=1)


PASSES = 8  # in one timed program
LARGEST_READING = 2**31  # bytes, more than any CPU cache


@dataclasses.dataclass(frozen=True)
class Device:
    """The peak rates of a device: FLOP/s of matmuls, and bytes/s of its memory."""

    flops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a pass: FLOPs and bytes moved."""

    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """Returns the lower bound of the time on a device."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameter counts: layers, routed experts among them, embedding and self-conditioning."""

    layers: int
    experts: int
    embedding: int
    self_conditioning: int

    @classmethod
    def of(cls, config: ModelConfig) -> 'Weights':
        sizes = {name: math.prod(s) for name, s in param_shapes(DiffusionGemma(config)).items()}
        backbone = {name: size for name, size in sizes.items() if name.startswith('backbone/')}
        return cls(
            layers=sum(backbone.values()),
            experts=sum(size for name, size in backbone.items() if '/experts/' in name),
            embedding=sizes['embedder/embedding'],
            self_conditioning=sum(
                size for name, size in sizes.items() if name.startswith('self_conditioning/')
            ),
        )


def pass_cost(
    config: ModelConfig,
    weights: Weights,
    batch: int,
    block: int,
    prefix: int,
    dtype: jnp.dtype,
    kind: str,
) -> Cost:
    """Returns the cost of a pass over `block` tokens per row after `prefix` cached tokens.

    Args:
      config: the config of the model.
      weights: its parameter counts.
      batch: the number of rows.
      block: the number of tokens per row.
      prefix: the number of cached tokens per row.
      dtype: the dtype of weights and activations.
      kind: 'encode' (the causal pass), 'token' (the same with logits of its last token) or
        'denoise' (self-conditioning, logits of all tokens, entropies and the next soft
        embeddings).
    """
    tokens, moe, itemsize = batch * block, config.moe, dtype.itemsize
    used, touched = weights.layers, weights.layers
    if moe is not None:
        # The share of experts that no token is routed to, if routing is uniform.
        unused = (1 - moe.top_k / moe.num_experts) ** tokens
        used -= weights.experts * (1 - moe.top_k / moe.num_experts)
        touched -= weights.experts * unused
    flops = 2.0 * used * tokens
    for layer in config.layer_types:
        attention = config.attention(layer)
        keys = min(prefix, attention.window or prefix) + block
        flops += 4.0 * config.num_heads * attention.head_dim * keys * tokens
    kernel_size = 1 if _WEIGHTS.value else itemsize
    moved = touched * kernel_size
    moved += batch * cache_bytes(config, prefix, dtype) if prefix else 0
    unembedded = {'encode': 0, 'token': batch, 'denoise': tokens}[kind]
    if unembedded:
        flops += 2.0 * weights.embedding * unembedded
        moved += weights.embedding * itemsize + 2 * 4 * unembedded * config.vocab_size
    if kind == 'denoise':
        flops += 2.0 * (weights.embedding + weights.self_conditioning) * tokens
        moved += weights.embedding * itemsize + weights.self_conditioning * kernel_size
        moved += 4 * unembedded * config.vocab_size  # the logits again, for the soft embeddings
    return Cost(flops, moved)


def costs(config: ModelConfig, batch: int, prefix: int, dtype: jnp.dtype) -> dict[str, Cost]:
    """Returns the cost of each pass of the sampler."""
    make = functools.partial(pass_cost, config, Weights.of(config), batch, dtype=dtype)
    canvas = config.canvas_length
    return {
        'prefill': make(block=prefix, prefix=0, kind='token'),
        'denoise step': make(block=canvas, prefix=prefix, kind='denoise'),
        'commit': make(block=canvas, prefix=prefix, kind='encode'),
        'autoregressive token': make(block=1, prefix=prefix, kind='token'),
    }


def named_device(name: str) -> Device:
    """Returns published bfloat16 peaks (`accounting.devices` names the sources)."""
    figures = figures_named(name)
    return Device(figures.peak_flops, figures.hbm_bandwidth)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Programs that measure the peaks of the first local device: matmuls and reading weights.

    Passes only read weights, so their bound is not the bandwidth of a copy or of an in-place
    update, which writes as much as it reads.
    """

    dtype: jnp.dtype
    num_bytes: int
    size: int = 2048

    def programs(self) -> dict[str, Callable]:
        matmul = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
        matrix, vector = jnp.ones((self.size, self.size), self.dtype), jnp.ones((self.size,))
        weights = jnp.ones((self.num_bytes // (4 * self.size), self.size), jnp.float32)
        return {
            'matmuls': functools.partial(matmul, matrix, matrix),
            'reading': functools.partial(matmul, weights, vector),
        }

    def device(self, seconds: dict[str, np.ndarray]) -> Device:
        flops = 2 * self.size**3 / seconds['matmuls'].min()
        return Device(flops, self.num_bytes / seconds['reading'].min())


def programs_to_measure(model, params, batch: int, prefix: int) -> dict[str, Callable]:
    """Returns a program for each pass, with one prefill or `PASSES` runs of the pass."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prefix), np.int32)
    lengths = np.full((batch,), prefix, np.int32)
    config = SamplingConfig(max_new_tokens=1, max_denoising_steps=10**6, temperature=0.0)
    prefill = jax.jit(prefilled, static_argnums=(0, 1))
    args = (params, jnp.asarray(prompts), jnp.asarray(lengths), jax.random.key(0), Controls())
    return {
        'prefill': lambda: prefill(model, config, *args),
        **pass_programs(model, params, config, prompts, lengths, PASSES),
    }


def random_model(config: ModelConfig, dtype: jnp.dtype) -> tuple[DiffusionGemma, dict]:
    """Returns a random model, whose weights are created on the device in the inference layout."""
    on_cpu = jax.default_backend() == 'cpu'
    execution = Execution(scan_layers=False, output_major=on_cpu)
    model = DiffusionGemma(config, dtype, execution)
    draw = jax.jit(
        lambda key, shape: jax.random.uniform(key, shape, dtype, -0.05, 0.05), static_argnums=1
    )
    drawn = {
        name: draw(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(param_shapes(model).items())
    }
    return model, unflatten_dict(drawn, sep='/')


def open_model(dtype: jnp.dtype) -> tuple[ModelConfig, tuple[DiffusionGemma, dict] | None]:
    """Returns the config that the flags select, and the model to be measured or None."""
    canvas = {'canvas_length': _CANVAS.value} if _CANVAS.value else {}
    if _CHECKPOINT.value is not None:
        model, params, _ = load_model(_CHECKPOINT.value, dtype)
        config = model.config.replace(**canvas)
        return config, for_inference(model.clone(config=config), params)
    if _PRESET.value not in PRESETS:
        raise ValueError(f'unknown preset {_PRESET.value!r}; known: {sorted(PRESETS)}.')
    config = PRESETS[_PRESET.value]
    config = config.replace(**({'canvas_length': config.canvas_length or 256} | canvas))
    return config, random_model(config, dtype) if _RANDOM_WEIGHTS.value else None


def print_speeds(milliseconds: dict[str, float], canvas_length: int, which: str) -> dict:
    """Prints and returns the decoding speeds that result from the times of the passes."""
    steps = _STEPS.value * milliseconds['denoise step']
    per_canvas = steps + milliseconds['commit']
    tokens = _BATCH_SIZE.value * canvas_length
    numbers = {
        'tokens_per_second': 1e3 * tokens / per_canvas,
        'gain': canvas_length * milliseconds['autoregressive token'] / per_canvas,
        'first_canvas_ms': milliseconds['prefill'] + steps,
    }
    print(
        f'{which}, {_STEPS.value} denoise steps and a commit per canvas: '
        f'{numbers["tokens_per_second"]:,.0f} tok/s, {numbers["gain"]:.2f}x autoregressive '
        f'decoding; first canvas after {numbers["first_canvas_ms"]:,.0f} ms, prefill included.'
    )
    return numbers


def main(argv: list[str]) -> None:
    del argv
    if (_PRESET.value is None) == (_CHECKPOINT.value is None):
        raise ValueError('Give either --preset or --checkpoint.')
    dtype = jnp.dtype(_DTYPE.value or ('bfloat16' if _DEVICE.value else 'float32'))
    batch, prefix = _BATCH_SIZE.value, _PREFIX.value
    config, opened = open_model(dtype)
    if opened and _WEIGHTS.value:
        model, params = opened
        opened = model, quantize_weights(model, params, _WEIGHTS.value)
    programs = programs_to_measure(*opened, batch, prefix) if opened else {}
    peaks = Peaks(dtype, min(parameter_counts(config).total * dtype.itemsize, LARGEST_READING))
    times = seconds_in_turns(programs | ({} if _DEVICE.value else peaks.programs()))
    taken = {
        label: 1e3 * float(np.median(times[label])) / (1 if label == 'prefill' else PASSES)
        for label in programs
    }
    device = named_device(_DEVICE.value) if _DEVICE.value else peaks.device(times)
    name = _DEVICE.value or f'{jax.devices()[0].device_kind}, peaks measured'
    table = Table(
        'pass', 'GFLOP', 'MB', 'limited by', 'limit ms', 'measured ms', 'measured / limit',
        title=f'{_PRESET.value or _CHECKPOINT.value}, weights {_WEIGHTS.value or dtype}, '
        f'batch {batch}, prefix {prefix}, canvas {config.canvas_length}: {name} '
        f'({device.flops / 1e9:,.0f} GFLOP/s, {device.bandwidth / 1e9:,.0f} GB/s)',
    )  # fmt: skip
    limits = {}
    for label, cost in costs(config, batch, prefix, dtype).items():
        limits[label] = limit = 1e3 * cost.seconds(device)
        by_compute = cost.flops / device.flops >= cost.bytes / device.bandwidth
        shown = (f'{taken[label]:,.2f}', f'{taken[label] / limit:.2f}x') if taken else ('', '')
        table.add_row(
            label, f'{cost.flops / 1e9:,.2f}', f'{cost.bytes / 1e6:,.1f}',
            'matmuls' if by_compute else 'memory', f'{limit:,.2f}', *shown,
        )  # fmt: skip
    Console().print(table)
    result = {'device': name, 'limit_ms': limits, 'measured_ms': taken}
    result['at_limit'] = print_speeds(limits, config.canvas_length, 'at the limit')
    if taken:
        result['measured'] = print_speeds(taken, config.canvas_length, 'measured')
    print(json.dumps(result))


if __name__ == '__main__':
    cli.run_main(main)
