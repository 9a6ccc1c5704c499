"""A canvas as it settles, for a live view: the state after every denoise step."""

import dataclasses
from collections.abc import Generator, Iterator

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import AnyArray, Params
from diffusiongemma.sampling import diffusion, drafter, lossless, passes
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.finite import check_finite
from diffusiongemma.sampling.sampler import DIFFUSION, LOSSLESS, Sampler
from diffusiongemma.sampling.state import CanvasTask, DenoiseState, GenerationState, SamplerOutput


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
_text_noise = jax.jit(lossless.text_noise, static_argnames=_STATIC)
_one_pass_draft = jax.jit(drafter.one_pass_draft, static_argnames=_STATIC)
_verify_draft = jax.jit(lossless.verify_draft, static_argnames=_STATIC)
_text_draft = jax.jit(drafter.text_draft, static_argnames=_STATIC)


def watch(
    sampler: Sampler,
    params: Params,
    tokens: AnyArray,
    lengths: AnyArray,
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
      ValueError, FloatingPointError: as a call of the sampler; ValueError also for the
        autoregressive mode.
    """
    if sampler.mode == 'autoregressive':
        raise ValueError(
            "The mode 'autoregressive' has no canvas to watch: use 'diffusion' or 'lossless', or "
            'Sampler.stream, which yields token by token.'
        )
    return _watch(sampler, params, sampler.checked(tokens, lengths, rng, controls))


def _watch(sampler: Sampler, params: Params, arguments: tuple) -> Iterator[Draft | SamplerOutput]:
    shown = _watch_canvases if sampler.mode == 'diffusion' else _watch_drafts
    output = yield from shown(sampler, params, arguments)
    check_finite(output.failed_pass)
    yield output


def _watch_canvases(
    sampler: Sampler, params: Params, arguments: tuple
) -> Generator[Draft, None, SamplerOutput]:
    """Every canvas of the diffusion mode; the output is returned."""
    model, config = sampler.model, sampler.config
    state = DIFFUSION.start(model, config, params, *arguments)
    while state.running:
        task = diffusion.canvas_task(model, state)
        limit = config.max_denoising_steps
        canvas = yield from _watch_canvas(sampler, params, state, task, limit)
        state = _commit_canvas(model, config, params, state, canvas)
    return state.output()


def _watch_drafts(
    sampler: Sampler, params: Params, arguments: tuple
) -> Generator[Draft, None, SamplerOutput]:
    """Every draft of the lossless mode; the output is returned."""
    model, config = sampler.model, sampler.config
    state = LOSSLESS.start(model, config, params, *arguments)
    while state.running:
        noise = _text_noise(model, config, state)
        text = _text_draft(model, config, state)
        if text is not None and text.is_enough(state.finished):
            drafted = text.drafted()
            yield _shown(sampler, state, drafted, jnp.zeros(drafted.tokens.shape))
        else:
            short = drafter.config_of_model_drafts(config, state)
            drafting = sampler if short is None else dataclasses.replace(sampler, config=short)
            drafted = yield from _watch_model(drafting, params, state, noise)
            if text is not None and short is None:
                drafted = text.in_place_of(drafted)
        state = _verify_draft(model, config, params, state, drafted, noise)
    return state.output()


def _watch_canvas(
    sampler: Sampler,
    params: Params,
    state: GenerationState | drafter.LosslessState,
    task: CanvasTask,
    limit: int,
    pending: jax.Array | None = None,
) -> Generator[Draft, None, DenoiseState]:
    """The canvas after each of its steps, after a `pending` token [B] if there is one.

    Returns it after the last step.
    """
    model, config = sampler.model, sampler.config
    canvas = _first_noise(model, config, params, task)
    yield _draft(state.output(), canvas, jnp.zeros_like(canvas.stopped), pending)
    while canvas.step < limit and not jnp.all(canvas.stopped):
        changing = ~canvas.stopped
        canvas = _denoise_step(model, config, params, state.cache, task, canvas)
        yield _draft(state.output(), canvas, changing, pending)
    return canvas


def _watch_model(
    sampler: Sampler, params: Params, state: drafter.LosslessState, noise: jax.Array | None
) -> Generator[Draft, None, drafter.Drafted]:
    """The model's draft after each of its steps; it is returned."""
    model, config = sampler.model, sampler.config
    if drafter.drafts_in_one_pass(model, config, state):
        light = _one_pass_draft(model, config, params, state, noise)
        drafted = drafter.Drafted(light.tokens, jnp.ones_like(state.pending), light.finite)
        yield _shown(sampler, state, drafted, None)
        yield _shown(sampler, state, drafted, light.entropies)
        return drafted
    task = drafter.draft_task(model, config, state, noise)
    limit = min(config.max_denoising_steps, config.max_draft_steps)
    before = state.pending if passes.predicts_next(model) else None
    canvas = yield from _watch_canvas(sampler, params, state, task, limit, before)
    return drafter.Drafted(drafter.drafted_tokens(model, canvas), canvas.steps, canvas.finite)


def _shown(
    sampler: Sampler,
    state: drafter.LosslessState,
    drafted: drafter.Drafted,
    entropies: jax.Array | None,
) -> Draft:
    """A draft after its pending token; noise in its place while there are no entropies [B, K]."""
    tokens = jnp.concatenate([state.pending[:, None], drafted.tokens], axis=1)
    noise_id = passes.mask_id(sampler.model)
    noise = jnp.full_like(tokens, sampler.config.pad_id if noise_id is None else noise_id)
    is_known = entropies is not None
    known = jnp.full(drafted.tokens.shape, jnp.inf) if entropies is None else entropies
    return Draft(
        output=state.output(),
        step=jnp.asarray(int(is_known), jnp.int32),
        argmax=tokens if is_known else jnp.full_like(tokens, -1),
        canvas=tokens if is_known else noise.at[:, 0].set(state.pending),
        entropies=jnp.pad(known, [(0, 0), (1, 0)]),
        changing=is_known & ~state.finished,
    )


def _draft(
    output: SamplerOutput,
    canvas: DenoiseState,
    changing: jax.Array,
    pending: jax.Array | None = None,
) -> Draft:
    argmax, tokens, entropies = canvas.argmax, canvas.canvas, canvas.entropies
    if pending is not None:
        argmax, tokens = (
            jnp.concatenate([pending[:, None], each], axis=1) for each in (argmax, tokens)
        )
        entropies = jnp.pad(entropies, [(0, 0), (1, 0)])
    return Draft(
        output=output,
        step=canvas.step,
        argmax=argmax,
        canvas=tokens,
        entropies=entropies,
        changing=changing,
    )
