"""Measures how the time of a denoise step grows with each size, and fits exponents.

    python benchmarks/growth.py --sizes=canvas,prefix,batch

Starting from a small random model, one size at a time is doubled. The table has a row for each
size: milliseconds (minimum of the repetitions) at every value, and the exponent p of time ~ size^p,
fitted by least squares to the logarithms of all values and of the last three, where fixed costs
matter less. p = 1 is proportional; attention makes p larger for long canvases and prefixes. The
last line is JSON.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from timing import seconds

from diffusiongemma import cli
from diffusiongemma.models import (
    AttentionConfig,
    DenoiserConfig,
    DiffusionGemma,
    ModelConfig,
    MoEConfig,
    for_inference,
    init_params,
)
from diffusiongemma.models.vocabulary import most_likely_tokens
from diffusiongemma.sampling import passes

# The default of each size, and the number of doublings.
SIZES = {
    'canvas': (32, 4),
    'prefix': (256, 4),
    'batch': (1, 4),
    'depth': (6, 3),
    'width': (256, 3),
    'experts': (8, 3),
    'vocabulary': (4096, 4),
}

_SIZES = flags.DEFINE_list('sizes', list(SIZES), 'Sizes to vary.')
_REPETITIONS = flags.DEFINE_integer(
    'repetitions', 9, 'Repetitions of each timed step.', lower_bound=2
)


def config_of(sizes: dict[str, int], routed: bool) -> ModelConfig:
    """Returns the config of a denoiser with five sliding layers for each full one."""
    width = sizes['width']
    attention = {'num_kv_heads': 2, 'head_dim': width // 4}
    moe = MoEConfig(num_experts=sizes['experts'], top_k=2, expert_width=width) if routed else None
    return ModelConfig(
        vocab_size=sizes['vocabulary'],
        width=width,
        num_heads=4,
        ffn_width=4 * width,
        layer_types=tuple('full' if i % 6 == 5 else 'sliding' for i in range(sizes['depth'])),
        sliding=AttentionConfig(**attention, window=512),
        full=AttentionConfig(**attention, rope_theta=1e6, rope_fraction=0.25),
        denoiser=DenoiserConfig(sizes['canvas']),
        moe=moe,
    )


def denoise_milliseconds(sizes: dict[str, int], routed: bool) -> float:
    """Returns the minimum time of a denoise step with its epilogue, with random weights."""
    model = DiffusionGemma(config_of(sizes, routed))
    model, params = for_inference(model, init_params(model, jax.random.key(0)))
    batch, prefix = sizes['batch'], sizes['prefix']
    cache = passes.empty_cache(model, params, batch, prefix)
    cache = cache.replace(lengths=jnp.full((batch,), prefix))
    canvas = jnp.zeros((batch, sizes['canvas']), jnp.int32)
    soft = passes.no_soft_embeddings(model, params, batch, sizes['canvas'])

    @jax.jit
    def step(params, cache, canvas, soft):
        logits = passes.denoise(model, params, cache, canvas, soft, canvas[:, 0])
        return most_likely_tokens(logits), passes.soft_embed(model, params, logits)

    times = seconds(lambda: step(params, cache, canvas, soft), _REPETITIONS.value)
    return 1e3 * float(times.min())


def exponent(values: list[int], times: list[float]) -> float:
    """Returns p of times ~ values^p, by least squares on the logarithms."""
    return float(np.polyfit(np.log(values), np.log(times), 1)[0])


def main(argv: list[str]) -> None:
    del argv
    unknown = sorted(set(_SIZES.value) - set(SIZES))
    if unknown:
        raise ValueError(f'unknown sizes {unknown}; known: {list(SIZES)}.')
    defaults = {name: default for name, (default, _) in SIZES.items()}
    table = Table('size', 'ms at each value', 'exponent', 'of the last three')
    rows = {}
    for name in _SIZES.value:
        first, doublings = SIZES[name]
        values = [first << i for i in range(doublings + 1)]
        times = [denoise_milliseconds(defaults | {name: v}, name == 'experts') for v in values]
        rows[name] = {
            'values': values,
            'milliseconds': times,
            'exponent': exponent(values, times),
            'last_exponent': exponent(values[-3:], times[-3:]),
        }
        shown = ', '.join(f'{v:,}: {t:.1f}' for v, t in zip(values, times, strict=True))
        table.add_row(
            name, shown, f'{rows[name]["exponent"]:.2f}', f'{rows[name]["last_exponent"]:.2f}'
        )
    Console().print(table)
    print(json.dumps({'device': jax.devices()[0].device_kind, 'sizes': rows}))


if __name__ == '__main__':
    cli.run_main(main)
