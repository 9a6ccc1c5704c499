"""Compares the passes of a checkpoint with golden outputs of another implementation.

python -m diffusiongemma.verify --checkpoint=DIR --golden=DIR/golden.npz

The golden file contains a prompt, a noisy canvas, a clean canvas to commit, and the outputs of the
passes over them. The last line of stdout is a JSON object from array name to the largest absolute
difference (for `accepted`: the number of positions that differ); the last line of stderr is a
verdict. The exit code is 1 if a float array differs by more than 1e-4 (or is not a number) or an
accepted position differs.

`logits_step1` is conditioned on the file's `logits_step0`, so that each pass is compared on the
inputs of the reference. If two float32 implementations each chain their own two passes, they
differ by several 1e-4 there, because the norm of the nearly uniform soft embeddings amplifies
rounding differences of the first pass. The chained difference is logged as well.
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

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.sampling.acceptance import EntropyBound
from diffusiongemma.sampling.epilogue import entropy
from diffusiongemma.sampling.scores import TokenScores

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Directory of the checkpoint.')
_GOLDEN = flags.DEFINE_string('golden', None, 'The golden .npz file.')

TOLERANCE = 1e-4
TEMPERATURE = 0.8  # of the shaped logits for `accepted` and `token_entropy`
CONDITIONING_TEMPERATURE = 0.7  # of the self-conditioning logits for `logits_step1`
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
    """Runs the passes of a golden file on its inputs, in float32.

    Args:
      model: the diffusion model.
      params: its parameters, float32.
      golden: the inputs: prompt and prompt_mask [B, P], canvas and commit [B, C], entropy_bound,
        and logits_step0 [B, C, V], on which the second denoise pass is conditioned.

    Returns:
      The outputs under the names of the golden file, and `chained_step1`, the second denoise pass
      conditioned on the first one of this model. Left padding of prompts is moved to the end for
      the passes; outputs are in the order of the golden file.

    Raises:
      ValueError: if an input is missing in the golden file, or does not fit this model.
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
        args = (canvas[:, None], starts, segments, prefix, soft)
        logits: jax.Array = apply(*args, method='denoise')
        return logits[:, 0]

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
    in_prompt = TokenScores.of(encoder_logits[:1, : first - 1], prompt[:1, 1:first], 1)
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
        'ar_ce': -jnp.mean(in_prompt.chosen),
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
                f'of the checkpoint has {model.config.vocab_size}; give the file of this model.'
            )
    empty = np.flatnonzero(~np.asarray(golden['prompt_mask'], bool).any(axis=1)).tolist()
    if empty:
        raise ValueError(f'golden prompt_mask: rows {empty} have no token.')


def differences(
    outputs: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns the largest absolute difference of each array (NaN if either array has NaN).

    For `accepted` it is the number of positions that differ. Outputs at padding tokens of the
    prompt are not compared.

    Args:
      outputs: the result of `golden_passes`.
      golden: the arrays of the golden file.

    Raises:
      ValueError: if an array is missing in the golden file or has another shape.
    """
    mask = np.asarray(golden['prompt_mask'], bool)
    result: dict[str, float] = {}
    for name in ARRAYS:
        output = outputs[name]
        if name not in golden or golden[name].shape != output.shape:
            shape = golden[name].shape if name in golden else 'nothing'
            raise ValueError(f'golden {name}: expected shape {output.shape}, found {shape}.')
        reference = golden[name]
        if name in ('encoder_hidden', 'encoder_logits'):
            output, reference = output[mask], reference[mask]
        if name == 'accepted':
            result[name] = int(np.sum(output != reference))
        else:
            result[name] = float(np.max(np.abs(output - reference)))
    return result


def holds(errors: Mapping[str, float]) -> bool:
    """Returns whether `differences` are within tolerance; NaN is not."""
    return all(
        value == 0 if name == 'accepted' else value <= TOLERANCE for name, value in errors.items()
    )


def verdict(checkpoint: str, errors: Mapping[str, float]) -> str:
    """Returns one line that interprets `differences` and names the next step."""
    failing = [name for name in ARRAYS if name in errors and not holds({name: errors[name]})]
    if not failing:
        largest = max((name for name in errors if name != 'accepted'), key=errors.__getitem__)
        return (
            f'{checkpoint} holds: it differs from the golden outputs by at most '
            f'{errors[largest]:.1e} (in {largest}; {TOLERANCE:g} is allowed). Next: python -m '
            f'diffusiongemma.sample --checkpoint={checkpoint}'
        )
    first = failing[0]
    by = f'at {errors[first]:g} positions' if first == 'accepted' else f'by {errors[first]:.1e}'
    return (
        f'{checkpoint} does not hold: {first} differs {by} ({TOLERANCE:g} is allowed, and no '
        f'position of accepted), with {len(failing)} of {len(ARRAYS)} arrays that differ. Next: '
        f'check that the golden file is of this checkpoint, then look at the weights and settings '
        f'that go into {first}, the first array in the order of the passes.'
    )


def main(argv: list[str]) -> None:
    """Compares a checkpoint with golden outputs."""
    del argv
    checkpoint = cli.required('checkpoint', _CHECKPOINT.value)
    golden_file = Path(cli.required('golden', _GOLDEN.value))
    if not golden_file.is_file():
        raise FileNotFoundError(f'no golden file at {golden_file}.')
    cli.say_devices()
    model, params, _ = load_model(checkpoint)
    if not isinstance(model, DiffusionGemma):
        raise ValueError(f'{checkpoint} is not a diffusion model (canvas_length is 0).')
    golden = dict(np.load(golden_file))
    outputs = golden_passes(model, params, golden)
    errors = differences(outputs, golden)
    chained = np.max(np.abs(outputs['chained_step1'] - golden['logits_step1']))
    logging.info('logits_step1 with chained passes: largest difference %.2e', chained)
    print(json.dumps(errors), flush=True)
    print(verdict(checkpoint, errors), file=sys.stderr)
    sys.exit(0 if holds(errors) else 1)


if __name__ == '__main__':
    flags.mark_flags_as_required(['checkpoint', 'golden'])
    cli.run_main(main)
