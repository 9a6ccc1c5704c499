"""Step-by-step generation for a live view: yields the canvas after every denoise step."""

import dataclasses
from collections.abc import Generator, Iterator

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import AnyArray, Params
from diffusiongemma.sampling import diffusion, drafter, lossless
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafter import LosslessState
from diffusiongemma.sampling.finite import check_finite
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.sampler import MODES, Arguments, Sampler, State
from diffusiongemma.sampling.state import CanvasTask, DenoiseState, SamplerOutput


@flax.struct.dataclass
class Draft:
    """The canvas of every row after a denoise step, or before the first one.

    Attributes:
      output: the responses without this canvas.
      step: [] int32, the number of denoise steps; at 0 the canvas is noise without a prediction.
      argmax: [B, C] int32, the argmax tokens; -1 at step 0.
      canvas: [B, C] int32, the accepted candidates and noise that the next step reads.
      entropies: [B, C] float32, the entropy of each position in nats; infinite at step 0.
      changing: [B] bool, the rows that took this step.
    """

    output: SamplerOutput
    step: jax.Array
    argmax: jax.Array
    canvas: jax.Array
    entropies: jax.Array
    changing: jax.Array

    def row(self, row: int) -> 'Draft':
        """Returns the canvas of one row, [1, ...]."""
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
    """Yields a `Draft` for the noise and every denoise step of each canvas, and then the output.

    The results equal those of a call of the sampler with the same arguments. Every step is a
    separate program that waits for the host, which is slower than a call.

    Args:
      sampler: a sampler in mode 'diffusion' or 'lossless'.
      params, tokens, lengths, rng, controls: the arguments of a call of the sampler.

    Raises:
      ValueError, FloatingPointError: the errors of a call of the sampler; ValueError also in the
        autoregressive mode.
    """
    check_has_canvas(sampler)
    return _watch(sampler, params, sampler.checked(tokens, lengths, rng, controls))


def check_has_canvas(sampler: Sampler) -> None:
    """Raises ValueError if the mode of the sampler has no canvas."""
    if sampler.mode == 'autoregressive':
        raise ValueError(
            "The mode 'autoregressive' has no canvas to watch: use 'diffusion' or 'lossless', or "
            'Sampler.stream, which yields token by token.'
        )


def _watch(
    sampler: Sampler, params: Params, arguments: Arguments
) -> Iterator[Draft | SamplerOutput]:
    start = MODES[sampler.mode].start
    state: State = start(sampler.model, sampler.config, params, *arguments)
    while state.running:
        state = yield from block_by_steps(sampler, params, state)
    output = state.output()
    check_finite(output.failed_pass)
    yield output


def block_by_steps(sampler: Sampler, params: Params, state: State) -> Generator[Draft, None, State]:
    """Decodes one block of every unfinished row like `Mode.advance`, one program per step.

    It yields a `Draft` for the noise and every step, and returns the state after the block. A
    draft that is copied from earlier text has one step and no noise.
    """
    if isinstance(state, LosslessState):
        return (yield from _next_draft(sampler, params, state))
    task = diffusion.canvas_task(sampler.model, state)
    limit = sampler.config.max_denoising_steps
    canvas = yield from _watch_canvas(sampler, params, state, task, limit)
    after: State = _commit_canvas(sampler.model, sampler.config, params, state, canvas)
    return after


def _next_draft(
    sampler: Sampler, params: Params, state: LosslessState
) -> Generator[Draft, None, LosslessState]:
    """Drafts for every unfinished row, verifies the drafts and returns the state."""
    model, config = sampler.model, sampler.config
    noise = _text_noise(model, config, state)
    text = _text_draft(model, config, state)
    has_text_draft, draft = jnp.zeros_like(state.finished), None
    if text is not None:
        has_text_draft = jnp.ones_like(state.finished) if text.matches is None else text.matches
        draft = text.drafted()
        rows = has_text_draft & ~state.finished
        if jnp.any(rows):
            yield _view_of(sampler, state, draft, jnp.zeros(draft.tokens.shape), rows)
    rows = ~(has_text_draft | state.finished)
    if draft is None or jnp.any(rows):
        short = drafter.config_of_model_drafts(config, state)
        model_sampler = sampler if short is None else dataclasses.replace(sampler, config=short)
        draft = yield from _watch_model(model_sampler, params, state, noise, rows)
        if text is not None and short is None:
            draft = text.in_place_of(draft)
    after: LosslessState = _verify_draft(model, config, params, state, draft, noise)
    return after


def _watch_canvas(
    sampler: Sampler,
    params: Params,
    state: State,
    task: CanvasTask,
    limit: int,
    pending: jax.Array | None = None,
) -> Generator[Draft, None, DenoiseState]:
    """Yields a canvas before and after each step, and returns its state after the last one.

    If `pending` tokens [B] are passed, they are prepended to the canvas that is shown.
    """
    model, config = sampler.model, sampler.config
    canvas: DenoiseState = _first_noise(model, config, params, task)
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
    """Yields the draft of the model for `rows` [B] bool after each step, and returns it."""
    model, config = sampler.model, sampler.config
    if drafter.drafts_in_one_pass(model, config, state):
        light = _one_pass_draft(model, config, params, state, noise)
        draft = drafter.Drafted(light.tokens, jnp.ones_like(state.pending), light.finite)
        yield _view_of(sampler, state, draft, None, rows)
        yield _view_of(sampler, state, draft, light.entropies, rows)
        return draft
    task = dataclasses.replace(drafter.draft_task(model, config, state, noise), active=rows)
    limit = min(config.max_denoising_steps, config.max_draft_steps)
    before = state.pending if traits(model).predict_next else None
    canvas = yield from _watch_canvas(sampler, params, state, task, limit, before)
    return drafter.Drafted(drafter.drafted_tokens(model, canvas), canvas.steps, canvas.finite)


def _view_of(
    sampler: Sampler,
    state: LosslessState,
    draft: drafter.Drafted,
    entropies: jax.Array | None,
    rows: jax.Array,
) -> Draft:
    """Returns the view of a draft that one pass or a lookup has computed.

    Args:
      sampler: the sampler.
      state: the state before the draft.
      draft: the draft tokens [B, K], which are shown after the pending tokens.
      entropies: [B, K] float32 in nats; None for the view before the pass, with noise instead of
        the draft.
      rows: [B] bool, the rows that this draft is for.
    """
    tokens = jnp.concatenate([state.pending[:, None], draft.tokens], axis=1)  # [B, K + 1]
    noise_id = traits(sampler.model).mask_id
    noise = jnp.full_like(tokens, sampler.config.pad_id if noise_id is None else noise_id)
    is_predicted = entropies is not None
    if entropies is None:
        entropies = jnp.full(draft.tokens.shape, jnp.inf)
    return Draft(
        output=state.output(),
        step=jnp.asarray(int(is_predicted), jnp.int32),
        argmax=tokens if is_predicted else jnp.full_like(tokens, -1),
        canvas=tokens if is_predicted else noise.at[:, 0].set(state.pending),
        entropies=jnp.pad(entropies, [(0, 0), (1, 0)]),  # 0 at the pending token
        changing=is_predicted & rows,
    )


def _draft(
    output: SamplerOutput,
    canvas: DenoiseState,
    changing: jax.Array,
    pending: jax.Array | None = None,
) -> Draft:
    """Returns the view of a canvas, after the `pending` tokens [B] if there are any."""
    argmax, tokens, entropies = canvas.argmax, canvas.canvas, canvas.entropies
    if pending is not None:
        argmax, tokens = (
            jnp.concatenate([pending[:, None], each], axis=1) for each in (argmax, tokens)
        )
        entropies = jnp.pad(entropies, [(0, 0), (1, 0)])  # [B, C + 1]
    return Draft(
        output=output,
        step=canvas.step,
        argmax=argmax,
        canvas=tokens,
        entropies=entropies,
        changing=changing,
    )
