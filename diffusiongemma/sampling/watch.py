"""A canvas as it settles, for a live view: the state after every denoise step."""

from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.sampling import diffusion
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.sampler import MODES, Sampler
from diffusiongemma.sampling.state import SamplerOutput


@flax.struct.dataclass
class Draft:
    """A canvas of every row after a denoise step.

    Attributes:
      output: what was committed before it.
      step: [] int32, denoise steps taken, >= 1.
      argmax: [B, C] int32, the most likely tokens.
      canvas: [B, C] int32, accepted candidates and noise, what the next step reads.
      entropies: [B, C] float32 in nats.
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


def watch(
    sampler: Sampler,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    rng: jax.Array,
    controls: Controls | None = None,
) -> Iterator[Draft | SamplerOutput]:
    """Yields a `Draft` after every denoise step, and last the output.

    The steps are those of a call with the same arguments, but each is a program of its own and
    waits for the host: slower than a call, which stays as it is.

    Args:
      sampler: of mode 'diffusion'.
      params, tokens, lengths, rng, controls: as of a call of the sampler.

    Raises:
      ValueError: as a call of the sampler, and for another mode.
    """
    if sampler.mode != 'diffusion':
        raise ValueError(
            f"Only mode 'diffusion' has drafts to watch, got {sampler.mode!r}; "
            'Sampler.stream yields the blocks of every mode.'
        )
    return _watch(sampler, params, sampler.checked(tokens, lengths, rng, controls))


def _watch(sampler: Sampler, params: Any, arguments: tuple) -> Iterator[Draft | SamplerOutput]:
    model, config = sampler.model, sampler.config
    state = MODES['diffusion'].start(model, config, params, *arguments)
    while state.running:
        task = diffusion.canvas_task(model, state)
        canvas = _first_noise(model, config, params, task)
        while canvas.step < config.max_denoising_steps and not jnp.all(canvas.stopped):
            changing = ~canvas.stopped
            canvas = _denoise_step(model, config, params, state.cache, task, canvas)
            yield Draft(
                output=state.output(),
                step=canvas.step,
                argmax=canvas.argmax,
                canvas=canvas.canvas,
                entropies=canvas.entropies,
                changing=jnp.asarray(changing),
            )
        state = _commit_canvas(model, config, params, state, canvas)
    yield state.output()
