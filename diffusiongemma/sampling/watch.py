"""A canvas as it settles, for a live view: the state after every denoise step."""

from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.sampling import diffusion, lossless
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.sampler import MODES, Sampler
from diffusiongemma.sampling.state import DenoiseState, SamplerOutput


@flax.struct.dataclass
class Draft:
    """A canvas of every row after a denoise step, or before its first one.

    Attributes:
      output: what was committed before it.
      step: [] int32, denoise steps taken; at 0 the canvas is noise and nothing is predicted.
      argmax: [B, C] int32, the most likely tokens; -1 at step 0.
      canvas: [B, C] int32, accepted candidates and noise, what the next step reads.
      entropies: [B, C] float32 in nats; infinite at step 0.
      changing: [B] bool, rows that took this step.
    """

    output: SamplerOutput
    step: jax.Array
    argmax: jax.Array
    canvas: jax.Array
    entropies: jax.Array
    changing: jax.Array


_STATIC = ('model', 'config')
_first_noise = jax.jit(diffusion.first_noise, static_argnames=_STATIC)
_denoise_step = jax.jit(diffusion.denoise_step, static_argnames=_STATIC)
_commit_canvas = jax.jit(diffusion.commit_canvas, static_argnames=_STATIC)
_verify_draft = jax.jit(lossless.verify_draft, static_argnames=_STATIC)


def watch(
    sampler: Sampler,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    rng: jax.Array,
    controls: Controls | None = None,
) -> Iterator[Draft | SamplerOutput]:
    """Yields a `Draft` of every canvas's noise and of every denoise step, and last the output.

    The steps are those of a call with the same arguments, but each is a program of its own and
    waits for the host: slower than a call, which stays as it is.

    Args:
      sampler: of mode 'diffusion' or 'lossless'.
      params, tokens, lengths, rng, controls: as of a call of the sampler.

    Raises:
      ValueError: as a call of the sampler, and for the autoregressive mode.
    """
    if sampler.mode == 'autoregressive':
        raise ValueError(
            "The mode 'autoregressive' has no canvas to watch: use 'diffusion' or 'lossless', or "
            'Sampler.stream, which yields token by token.'
        )
    return _watch(sampler, params, sampler.checked(tokens, lengths, rng, controls))


def _watch(sampler: Sampler, params: Any, arguments: tuple) -> Iterator[Draft | SamplerOutput]:
    model, config = sampler.model, sampler.config
    verifies, limit = sampler.mode == 'lossless', config.max_denoising_steps
    if verifies:
        limit = min(limit, config.max_draft_steps)
    state = MODES[sampler.mode].start(model, config, params, *arguments)
    while state.running:
        if verifies:
            task, verify_keys = lossless.draft_task(model, state)
        else:
            task = diffusion.canvas_task(model, state)
        canvas = _first_noise(model, config, params, task)
        yield _draft(state.output(), canvas, jnp.zeros_like(canvas.stopped))
        while canvas.step < limit and not jnp.all(canvas.stopped):
            changing = ~canvas.stopped
            canvas = _denoise_step(model, config, params, state.cache, task, canvas)
            yield _draft(state.output(), canvas, changing)
        if verifies:
            state = _verify_draft(model, config, params, state, canvas, verify_keys)
        else:
            state = _commit_canvas(model, config, params, state, canvas)
    yield state.output()


def _draft(output: SamplerOutput, canvas: DenoiseState, changing: jax.Array) -> Draft:
    return Draft(
        output=output,
        step=canvas.step,
        argmax=canvas.argmax,
        canvas=canvas.canvas,
        entropies=canvas.entropies,
        changing=changing,
    )
