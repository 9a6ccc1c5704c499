"""The least time that each pass can take on a device, and here what it does take.

    python benchmarks/roofline.py --preset=diffusiongemma_26b_a4b --device=H200 --prefix=4096
    python benchmarks/roofline.py --checkpoint=builtin

For every pass of the sampler: floating-point operations of its matrix products, bytes that it must
move between memory and processor (weights once, experts only as far as tokens are routed to them,
K/V cache, logits), and the longer of the two times at the device's peaks. With `--preset` that is
all; a checkpoint is also run on the first local device, and the time measured divided by the limit.
The peaks of a CPU are measured: a large product, and a copy of an array as large as the weights
(small ones stay in its cache).
"""

import dataclasses
import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from diffusiongemma import run_config
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.models import (
    PRESETS,
    DiffusionGemma,
    ModelConfig,
    cache_bytes,
    parameter_counts,
    unroll_layers,
)
from diffusiongemma.sampling import passes

_PRESET = flags.DEFINE_string('preset', None, 'A model of diffusiongemma.models.PRESETS.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A diffusion student to measure.')
_DEVICE = flags.DEFINE_string('device', None, 'A name of DEVICES; default: this CPU, measured.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of weights and products.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 1, 'Rows.', lower_bound=1)
_PREFIX = flags.DEFINE_integer('prefix', 128, 'Cached tokens before the canvas.', lower_bound=1)
_CANVAS = flags.DEFINE_integer('canvas', 0, "Canvas length; 0: the model's own.", lower_bound=0)
_STEPS = flags.DEFINE_integer('steps', 16, 'Denoise steps per canvas.', lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates of one device: FLOP/s of matrix products, bytes/s of its memory."""

    flops: float
    bandwidth: float


# bfloat16 without sparsity. TPUs: cloud.google.com/tpu/docs (v5e, v5p, v6e); GPUs: NVIDIA's data
# sheets of the H100 SXM and the H200 SXM.
DEVICES = {
    'v5e': Device(197e12, 819e9),
    'v5p': Device(459e12, 2765e9),
    'v6e': Device(918e12, 1640e9),
    'H100': Device(989e12, 3350e9),
    'H200': Device(989e12, 4800e9),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one pass needs: floating-point operations, and bytes moved."""

    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """The least time on a device."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of one pass: of the layers, of routed experts among them, of the embedding."""

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
    config: ModelConfig, batch: int, block: int, prefix: int, dtype: jnp.dtype, kind: str
) -> Cost:
    """Cost of one pass over `block` tokens a row behind `prefix` cached ones.

    Args:
      config: of the model.
      batch: rows.
      block: tokens of a row.
      prefix: cached tokens of a row.
      dtype: of weights and activations.
      kind: 'encode' (the causal pass), 'token' (the same with logits of its last token) or
        'denoise' (self-conditioning, logits of all tokens, entropies and the next soft
        embeddings).
    """
    weights, tokens, moe = Weights.of(config), batch * block, config.moe
    itemsize = dtype.itemsize
    used, touched = weights.layers, weights.layers
    if moe is not None:
        missed = (1 - moe.top_k / moe.num_experts) ** tokens  # by all, if evenly routed
        used -= weights.experts * (1 - moe.top_k / moe.num_experts)
        touched -= weights.experts * missed
    flops = 2.0 * used * tokens
    for layer in config.layer_types:
        attention = config.attention(layer)
        seen = min(prefix, attention.window or prefix) + block
        flops += 4.0 * config.num_heads * attention.head_dim * seen * tokens
    moved = touched * itemsize
    moved += batch * cache_bytes(config, prefix, dtype) if prefix else 0
    unembedded = {'encode': 0, 'token': batch, 'denoise': tokens}[kind]
    if unembedded:
        flops += 2.0 * weights.embedding * unembedded
        moved += weights.embedding * itemsize + 2 * 4 * unembedded * config.vocab_size
    if kind == 'denoise':
        flops += 2.0 * (weights.embedding + weights.self_conditioning) * tokens
        moved += (weights.embedding + weights.self_conditioning) * itemsize
        moved += 4 * unembedded * config.vocab_size  # the logits again, for the soft embeddings
    return Cost(flops, moved)


def costs(config: ModelConfig, batch: int, prefix: int, dtype: jnp.dtype) -> dict[str, Cost]:
    """Cost of each pass of the sampler."""
    make = functools.partial(pass_cost, config, batch, dtype=dtype)
    canvas = config.canvas_length
    return {
        'prefill': make(block=prefix, prefix=0, kind='token'),
        'denoise step': make(block=canvas, prefix=prefix, kind='denoise'),
        'commit': make(block=canvas, prefix=prefix, kind='encode'),
        'autoregressive token': make(block=1, prefix=prefix, kind='token'),
    }


def best_seconds(run, repetitions: int = 15) -> float:
    """The least of several times of `run()`, compiled before."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def measured_device(dtype: jnp.dtype, num_bytes: int) -> Device:
    """Peaks of the first local device: a product of [2048, 2048] matrices, a copy of an array."""
    matrix = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    array = jnp.ones((num_bytes // 4,), jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return Device(
        2 * 2048**3 / best_seconds(lambda: product(matrix)),
        2 * array.nbytes / best_seconds(lambda: copy(array)),
    )


def measured_passes(model, params, batch: int, prefix: int) -> dict[str, float]:
    """Seconds of each pass, one compiled program each."""
    canvas_length = model.config.canvas_length
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, model.config.vocab_size, (batch, prefix)), jnp.int32)
    canvas = jnp.asarray(rng.integers(0, model.config.vocab_size, (batch, canvas_length)))
    canvas, active = canvas.astype(jnp.int32), jnp.ones((batch,), bool)
    lengths = jnp.full((batch,), prefix)

    @jax.jit
    def prefill(params):
        cache = passes.empty_cache(model, params, batch, prefix + canvas_length)
        return passes.prefill(model, params, cache, prompt, lengths, is_empty=True)

    @jax.jit
    def denoise(params, cache, soft):
        logits = passes.denoise(model, params, cache, canvas, soft, prompt[:, -1])
        return jnp.argmax(logits, -1), passes.soft_embed(model, params, logits)

    @functools.partial(jax.jit, static_argnums=3)
    def encode(params, cache, tokens, with_logits):
        hidden, kv = passes.encode_block(model, params, cache, tokens, active)
        if with_logits:
            hidden = jnp.argmax(model.apply({'params': params}, hidden, method='unembed'), -1)
        return hidden, kv

    cache = prefill(params)[1]
    soft = passes.no_soft_embeddings(model, params, batch, canvas_length)
    return {
        'prefill': best_seconds(lambda: prefill(params)),
        'denoise step': best_seconds(lambda: denoise(params, cache, soft)),
        'commit': best_seconds(lambda: encode(params, cache, canvas, False)),
        'autoregressive token': best_seconds(lambda: encode(params, cache, canvas[:, :1], True)),
    }


def main(argv: list[str]) -> None:
    del argv
    if (_PRESET.value is None) == (_CHECKPOINT.value is None):
        raise ValueError('Give --preset or --checkpoint, one of them.')
    if _DEVICE.value is not None and _DEVICE.value not in DEVICES:
        raise ValueError(f'unknown device {_DEVICE.value!r}; known: {sorted(DEVICES)}.')
    dtype = jnp.dtype(_DTYPE.value or ('bfloat16' if _DEVICE.value else 'float32'))
    measured = {}
    if _PRESET.value is not None:
        if _PRESET.value not in PRESETS:
            raise ValueError(f'unknown preset {_PRESET.value!r}; known: {sorted(PRESETS)}.')
        config = PRESETS[_PRESET.value]
    else:
        model, params, _ = load_model(_CHECKPOINT.value, dtype)
        config = model.config
    config = config.replace(canvas_length=_CANVAS.value or config.canvas_length or 256)
    batch, prefix = _BATCH_SIZE.value, _PREFIX.value
    if _CHECKPOINT.value is not None:
        model = model.clone(config=config)
        model, params = unroll_layers(model, params)
        measured = measured_passes(model, params, batch, prefix)
    num_bytes = parameter_counts(config).total * dtype.itemsize
    device = DEVICES[_DEVICE.value] if _DEVICE.value else measured_device(dtype, num_bytes)
    name = _DEVICE.value or f'{jax.devices()[0].device_kind}, peaks measured'
    table = Table(
        'pass', 'GFLOP', 'MB', 'limited by', 'limit ms', 'measured ms', 'measured / limit',
        title=f'{_PRESET.value or _CHECKPOINT.value}, {dtype}, batch {batch}, prefix {prefix}, '
        f'canvas {config.canvas_length}: {name} ({device.flops / 1e9:,.0f} GFLOP/s, '
        f'{device.bandwidth / 1e9:,.0f} GB/s)',
    )  # fmt: skip
    rows = {}
    limits = {}
    for label, cost in costs(config, batch, prefix, dtype).items():
        limits[label] = limit = cost.seconds(device)
        by_compute = cost.flops / device.flops >= cost.bytes / device.bandwidth
        taken = measured.get(label)
        rows[label] = {'flops': cost.flops, 'bytes': cost.bytes, 'limit_ms': 1e3 * limit}
        if taken:
            rows[label] |= {'measured_ms': 1e3 * taken, 'ratio': taken / limit}
        table.add_row(
            label, f'{cost.flops / 1e9:,.2f}', f'{cost.bytes / 1e6:,.1f}',
            'products' if by_compute else 'memory', f'{1e3 * limit:,.2f}',
            f'{1e3 * taken:,.2f}' if taken else '', f'{taken / limit:.2f}x' if taken else '',
        )  # fmt: skip
    Console().print(table)
    per_canvas = _STEPS.value * limits['denoise step'] + limits['commit']
    speed = batch * config.canvas_length / per_canvas
    gain = config.canvas_length * limits['autoregressive token'] / per_canvas
    print(f'{_STEPS.value} denoise steps and a commit per canvas: {speed:,.0f} tok/s at the limit,')
    print(f'{gain:.2f}x autoregressive decoding at its limit.')
    print(json.dumps({'device': name, 'passes': rows, 'tokens_per_second': speed, 'gain': gain}))


if __name__ == '__main__':
    run_config.run_main(main)
