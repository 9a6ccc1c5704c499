"""A canvas as it settles, for a live view: the state after every denoise step."""

import dataclasses
from collections.abc import Generator, Iterator

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import AnyArray, Params
from diffusiongemma.sampling import diffusion, drafter, lossless, passes
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafter import LosslessState
from diffusiongemma.sampling.finite import check_finite
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.sampler import MODES, Sampler, State
from diffusiongemma.sampling.state import CanvasTask, DenoiseState, SamplerOutput


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

    def row(self, row: int) -> 'Draft':
        """The canvas of one row alone, [1, ...]."""
        return map_but(lambda leaf: leaf[row : row + 1], self, step=self.step)


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
    check_has_canvas(sampler)
    return _watch(sampler, params, sampler.checked(tokens, lengths, rng, controls))


def check_has_canvas(sampler: Sampler) -> None:
    """Raises ValueError where there is nothing to watch."""
    if sampler.mode == 'autoregressive':
        raise ValueError(
            "The mode 'autoregressive' has no canvas to watch: use 'diffusion' or 'lossless', or "
            'Sampler.stream, which yields token by token.'
        )


def _watch(sampler: Sampler, params: Params, arguments: tuple) -> Iterator[Draft | SamplerOutput]:
    start = MODES[sampler.mode].start
    state: State = start(sampler.model, sampler.config, params, *arguments)
    while state.running:
        state = yield from block_by_steps(sampler, params, state)
    output = state.output()
    check_finite(output.failed_pass)
    yield output


def block_by_steps(sampler: Sampler, params: Params, state: State) -> Generator[Draft, None, State]:
    """One more block of every unfinished row, as `Mode.advance`, each step a program of its own.

    Yields a `Draft` of its noise and of every step, and returns the state after it. A draft that
    is looked up in the text takes one step without noise.
    """
    if isinstance(state, LosslessState):
        return (yield from _next_draft(sampler, params, state))
    task = diffusion.canvas_task(sampler.model, state)
    limit = sampler.config.max_denoising_steps
    canvas = yield from _watch_canvas(sampler, params, state, task, limit)
    return _commit_canvas(sampler.model, sampler.config, params, state, canvas)


def _next_draft(
    sampler: Sampler, params: Params, state: LosslessState
) -> Generator[Draft, None, LosslessState]:
    """A draft of every unfinished row, which is then verified."""
    model, config = sampler.model, sampler.config
    noise = _text_noise(model, config, state)
    text = _text_draft(model, config, state)
    found, drafted = jnp.zeros_like(state.finished), None
    if text is not None:
        found = jnp.ones_like(found) if text.found is None else text.found
        drafted = text.drafted()
        rows = found & ~state.finished
        if jnp.any(rows):
            yield _shown(sampler, state, drafted, jnp.zeros(drafted.tokens.shape), rows)
    if drafted is None or not jnp.all(found | state.finished):
        short = drafter.config_of_model_drafts(config, state)
        drafting = sampler if short is None else dataclasses.replace(sampler, config=short)
        drafted = yield from _watch_model(drafting, params, state, noise, ~(found | state.finished))
        if text is not None and short is None:
            drafted = text.in_place_of(drafted)
    return _verify_draft(model, config, params, state, drafted, noise)


def _watch_canvas(
    sampler: Sampler,
    params: Params,
    state: State,
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
    sampler: Sampler,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
    rows: jax.Array,
) -> Generator[Draft, None, drafter.Drafted]:
    """The model's draft of some `rows` [B] bool after each of its steps; it is returned."""
    model, config = sampler.model, sampler.config
    if drafter.drafts_in_one_pass(model, config, state):
        light = _one_pass_draft(model, config, params, state, noise)
        drafted = drafter.Drafted(light.tokens, jnp.ones_like(state.pending), light.finite)
        yield _shown(sampler, state, drafted, None, rows)
        yield _shown(sampler, state, drafted, light.entropies, rows)
        return drafted
    task = dataclasses.replace(drafter.draft_task(model, config, state, noise), active=rows)
    limit = min(config.max_denoising_steps, config.max_draft_steps)
    before = state.pending if passes.predicts_next(model) else None
    canvas = yield from _watch_canvas(sampler, params, state, task, limit, before)
    return drafter.Drafted(drafter.drafted_tokens(model, canvas), canvas.steps, canvas.finite)


def _shown(
    sampler: Sampler,
    state: LosslessState,
    drafted: drafter.Drafted,
    entropies: jax.Array | None,
    rows: jax.Array,
) -> Draft:
    """A draft of some `rows` [B] bool after its pending token; noise in its place while there are
    no entropies [B, K]."""
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
        changing=is_known & rows,
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
