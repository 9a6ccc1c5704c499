"""Compares the passes of a checkpoint with golden outputs of another implementation.

python -m diffusiongemma.verify --checkpoint=DIR --golden=DIR/golden.npz

The golden file holds a prompt, a noisy canvas, a clean canvas that is committed, and what the
passes over them give. The last line of stdout is a JSON object from array name to the largest
absolute difference (for `accepted`: positions that differ), that of stderr a verdict. Exits with 1
when a float array differs by more than 1e-4 (or is not a number) or an accepted position differs.

`logits_step1` is conditioned on the file's `logits_step0`, so that each pass is compared on the
reference's own inputs. Two float32 implementations that each chain their own two passes differ by
several 1e-4 there: what the first pass rounds differently, the norm of the nearly uniform soft
embeddings amplifies. The chained difference is logged too.
"""

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from diffusiongemma import run_config
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.distillation.losses import cross_entropy
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.sampling.acceptance import EntropyBound
from diffusiongemma.sampling.epilogue import entropy

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Directory of the checkpoint.')
_GOLDEN = flags.DEFINE_string('golden', None, 'The golden .npz file.')

TOLERANCE = 1e-4
TEMPERATURE = 0.8  # of the shaped logits behind `accepted` and `token_entropy`
CONDITIONING_TEMPERATURE = 0.7  # of the self-conditioning logits behind `logits_step1`
ARRAYS = (
    'encoder_hidden', 'encoder_logits', 'logits_step0', 'logits_step1', 'next_encoder_logits',
    'logits_canvas2', 'accepted', 'token_entropy', 'ar_ce',
)  # fmt: skip
INPUTS = ('prompt', 'prompt_mask', 'canvas', 'commit', 'entropy_bound', 'logits_step0')


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def _apply(model: DiffusionGemma, params: Params, *args: Any, method: str) -> Any:
    with jax.default_matmul_precision('highest'):
        return model.apply({'params': params}, *args, method=method)


def golden_passes(
    model: DiffusionGemma, params: Params, golden: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Runs the passes whose outputs `golden` holds, on its inputs, in float32.

    Args:
      model: the denoiser.
      params: float32 parameters.
      golden: prompt and prompt_mask [B, P], canvas and commit [B, C], entropy_bound, and
        logits_step0 [B, C, V] as what conditions the second denoise pass.

    Returns:
      The outputs under the golden file's names, and `chained_step1`: the second denoise pass
      conditioned on our own first one. Prompt rows stand where the golden file has them: padding
      on the left is moved behind the row for the passes and back again.

    Raises:
      ValueError: an input is missing in the golden file, or is not of this model.
    """
    _check_inputs(model, golden)

    apply = functools.partial(_apply, model, params)
    mask = np.asarray(golden['prompt_mask'], bool)
    order = np.argsort(~mask, axis=1, kind='stable')  # real tokens first
    prompt = jnp.asarray(np.take_along_axis(golden['prompt'], order, axis=1))
    batch_size, width = prompt.shape
    lengths = jnp.asarray(mask.sum(axis=1), jnp.int32)
    canvas, commit = jnp.asarray(golden['canvas']), jnp.asarray(golden['commit'])
    canvas_length = canvas.shape[1]

    cache = KVCache.create(model.config, batch_size, width + canvas_length)
    positions = jnp.broadcast_to(jnp.arange(width), prompt.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, kv = apply(prompt, positions, segment_ids, method='encode')
    encoder_logits = apply(hidden, method='unembed')
    cache = cache.append(kv, lengths)

    def denoise(cache: KVCache, soft: jax.Array | None = None) -> jax.Array:
        starts = cache.lengths[:, None]
        segments = jnp.ones_like(starts)
        prefix = cache.as_prefix()
        return apply(canvas[:, None], starts, segments, prefix, soft, method='denoise')[:, 0]

    def denoise_after(logits: jax.Array) -> jax.Array:
        soft = apply(logits / CONDITIONING_TEMPERATURE, method='soft_embed')
        return denoise(cache, soft[:, None])

    step0 = denoise(cache)
    entropies = entropy(step0 / TEMPERATURE)
    next_positions = cache.lengths[:, None] + jnp.arange(canvas_length)
    next_hidden, kv = apply(
        commit, next_positions, jnp.ones_like(commit), cache.as_prefix(), method='encode'
    )
    committed = cache.append(kv, jnp.full((batch_size,), canvas_length))
    first = int(lengths[0])
    back = np.argsort(order, axis=1)[..., None]
    outputs = {
        'encoder_hidden': np.take_along_axis(np.asarray(hidden), back, axis=1),
        'encoder_logits': np.take_along_axis(np.asarray(encoder_logits), back, axis=1),
        'logits_step0': step0,
        'logits_step1': denoise_after(jnp.asarray(golden['logits_step0'])),
        'next_encoder_logits': apply(next_hidden, method='unembed'),
        'logits_canvas2': denoise(committed),
        'accepted': EntropyBound(float(golden['entropy_bound'])).accept(entropies),
        'token_entropy': entropies,
        'ar_ce': jnp.mean(cross_entropy(encoder_logits[0, : first - 1], prompt[0, 1:first])),
        'chained_step1': denoise_after(step0),
    }
    return {name: np.asarray(value) for name, value in outputs.items()}


def _check_inputs(model: DiffusionGemma, golden: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in INPUTS if name not in golden]
    if missing:
        raise ValueError(f'the golden file lacks {missing}; it holds {sorted(golden)}.')
    for name in ('prompt', 'canvas', 'commit'):
        tokens = golden[name]
        if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
            raise ValueError(
                f'golden {name} has tokens from {tokens.min()} to {tokens.max()}, the vocabulary '
                f'of the checkpoint has {model.config.vocab_size}; they are not of one model.'
            )
    empty = np.flatnonzero(~np.asarray(golden['prompt_mask'], bool).any(axis=1)).tolist()
    if empty:
        raise ValueError(f'golden prompt_mask: rows {empty} have no token.')


def differences(
    outputs: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Largest absolute difference of each array (NaN where either has NaN).

    For `accepted` the number of positions that differ. What stands on a padded prompt token
    means nothing and is not compared.

    Args:
      outputs: what `golden_passes` returns.
      golden: arrays of the golden file.

    Raises:
      ValueError: an array is missing in the golden file or has another shape.
    """
    mask = np.asarray(golden['prompt_mask'], bool)
    found: dict[str, float] = {}
    for name in ARRAYS:
        ours = outputs[name]
        if name not in golden or golden[name].shape != ours.shape:
            shape = golden[name].shape if name in golden else 'nothing'
            raise ValueError(f'golden {name}: expected shape {ours.shape}, found {shape}.')
        theirs = golden[name]
        if name in ('encoder_hidden', 'encoder_logits'):
            ours, theirs = ours[mask], theirs[mask]
        if name == 'accepted':
            found[name] = int(np.sum(ours != theirs))
        else:
            found[name] = float(np.max(np.abs(ours - theirs)))
    return found


def holds(found: Mapping[str, float]) -> bool:
    """Whether `differences` are within tolerance. A comparison with NaN is false: NaN fails."""
    return all(
        value == 0 if name == 'accepted' else value <= TOLERANCE for name, value in found.items()
    )


def verdict(checkpoint: str, found: Mapping[str, float]) -> str:
    """Returns what `differences` mean, and what to do next, in one line."""
    failing = [name for name in ARRAYS if name in found and not holds({name: found[name]})]
    if not failing:
        largest = max((name for name in found if name != 'accepted'), key=found.__getitem__)
        return (
            f'{checkpoint} holds: it differs from the golden outputs by at most '
            f'{found[largest]:.1e} (in {largest}; {TOLERANCE:g} is allowed). Next: python -m '
            f'diffusiongemma.sample --checkpoint={checkpoint}'
        )
    first = failing[0]
    by = f'at {found[first]:g} positions' if first == 'accepted' else f'by {found[first]:.1e}'
    return (
        f'{checkpoint} does not hold: {first} differs {by} ({TOLERANCE:g} is allowed, and no '
        f'position of accepted), with {len(failing)} of {len(ARRAYS)} arrays that differ. Next: '
        f'see that the golden file is of this checkpoint, then look at the weights and settings '
        f'that go into {first}, the first array in the order of the passes.'
    )


def main(argv: list[str]) -> None:
    """Compares a checkpoint with golden outputs."""
    del argv
    checkpoint = run_config.given('checkpoint', _CHECKPOINT.value)
    golden_file = Path(run_config.given('golden', _GOLDEN.value))
    if not golden_file.is_file():
        raise FileNotFoundError(f'no golden file at {golden_file}.')
    run_config.say_devices()
    model, params, _ = load_model(checkpoint)
    if not isinstance(model, DiffusionGemma):
        raise ValueError(f'{checkpoint} is no diffusion model (canvas_length is 0).')
    golden = dict(np.load(golden_file))
    outputs = golden_passes(model, params, golden)
    found = differences(outputs, golden)
    chained = np.max(np.abs(outputs['chained_step1'] - golden['logits_step1']))
    logging.info('logits_step1 after our own first step: largest difference %.2e', chained)
    print(json.dumps(found), flush=True)
    print(verdict(checkpoint, found), file=sys.stderr)
    sys.exit(0 if holds(found) else 1)


if __name__ == '__main__':
    flags.mark_flags_as_required(['checkpoint', 'golden'])
    run_config.run_main(main)
