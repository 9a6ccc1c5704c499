"""Who drafts in the lossless mode: the text so far where it offers something, else the model."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import trace
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import OPEN
from diffusiongemma.sampling.diffusion import canvas_task, denoise_canvas
from diffusiongemma.sampling.drafts import LightDraft, PromptLookup, history_of, light_draft
from diffusiongemma.sampling.noise import first_canvas, hold
from diffusiongemma.sampling.passes import CausalModel, DenoisingModel
from diffusiongemma.sampling.randomness import fold_in_rows, split_rows
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.scores import TokenScores
from diffusiongemma.sampling.state import (
    CanvasTask,
    DenoiseState,
    GenerationState,
    SamplerOutput,
)

T = TypeVar('T')

LONGEST_NGRAM = 6  # that a lookup tells from a shorter one


@flax.struct.dataclass
class LosslessState:
    """The carry of the lossless mode's loop.

    Attributes:
      generation: what has been emitted and cached.
      pending: [B] int32, each row's next token, drawn but neither emitted nor cached.
      hidden: [B, D], final hidden state of each row's last encoded token.
      prompt: [B, P] int32, right-padded.
      prompt_lengths: [B] int32.
      draft_steps: [B] int32, denoise steps that each row's next draft may take.
      accepted_lengths: [B, K + 2] int32, verifications after which so many tokens were emitted.
      pending_scores: of the pending tokens, [B, 1], where the config asks for them.
    """

    generation: GenerationState
    pending: jax.Array
    hidden: jax.Array
    prompt: jax.Array
    prompt_lengths: jax.Array
    draft_steps: jax.Array
    accepted_lengths: jax.Array
    pending_scores: TokenScores | None = None

    @property
    def running(self) -> jax.Array:
        return self.generation.running

    @property
    def cache(self) -> KVCache:
        return self.generation.cache

    @property
    def finished(self) -> jax.Array:
        return self.generation.finished

    def insert(self, new: 'LosslessState', slots: jax.Array) -> 'LosslessState':
        """As `GenerationState.insert`."""

        def put(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[slots].set(rows, mode='drop')

        generation = self.generation.insert(new.generation, slots)
        return map_but(put, self, new, generation=generation)

    def output(self) -> SamplerOutput:
        output = self.generation.output()
        return dataclasses.replace(output, accepted_lengths=self.accepted_lengths)


class Drafted(NamedTuple):
    """What is verified.

    Attributes:
      tokens: [B, K] int32, what may follow the pending tokens.
      steps: [B] int32, denoise passes that the draft took.
      finite: [B] bool, whether the logits of these passes were finite.
    """

    tokens: jax.Array
    steps: jax.Array
    finite: jax.Array


def draft_length(model: CausalModel, config: SamplingConfig) -> int:
    """K, tokens of a draft; the pending token is not one of them."""
    if config.drafts is not None:
        return config.drafts.length
    return canvas_length(model, config) - (0 if passes.predicts_next(model) else 1)


def canvas_length(model: CausalModel, config: SamplingConfig) -> int:
    """Tokens of a canvas that is a draft."""
    return config.draft_length or model.config.canvas_length


def config_of_model_drafts(config: SamplingConfig, state: LosslessState) -> SamplingConfig | None:
    """The config with the length of the model's drafts, where that is one of its own.

    A verification is as wide as its drafts, so that this needs a single row: in a batch some rows
    have a lookup's draft where others have the model's.
    """
    if config.model_draft_length is None or state.pending.shape[0] > 1:
        return None
    return dataclasses.replace(
        config, draft_length=config.model_draft_length, model_draft_length=None
    )


class TextDraft(NamedTuple):
    """What the text so far offers.

    Attributes:
      tokens: [B, K] int32, what may follow the pending tokens.
      found: [B] bool, rows in which it takes the place of the model's draft; None where it does
        in every row, whatever it holds.
    """

    tokens: jax.Array
    found: jax.Array | None

    def is_enough(self, finished: jax.Array) -> jax.Array | bool:
        """Whether no unfinished row [B] needs the model's draft."""
        return True if self.found is None else jnp.all(self.found | finished)

    def drafted(self) -> Drafted:
        """It alone, without a denoise pass."""
        rows = self.tokens.shape[0]
        return Drafted(self.tokens, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))

    def in_place_of(self, drafted: Drafted) -> Drafted:
        """The model's drafts, but for the rows in which the text's take their place."""
        if self.found is None:
            return self.drafted()
        return Drafted(
            tokens=jnp.where(self.found[:, None], self.tokens, drafted.tokens),
            steps=jnp.where(self.found, 0, drafted.steps),
            finite=self.found | drafted.finite,
        )


def draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
) -> Drafted:
    """What may follow the pending tokens, of one length whoever drafts.

    Arguments as of `with_draft`; `model_draft_length` is of no effect.
    """
    config = dataclasses.replace(config, model_draft_length=None)
    return with_draft(model, config, params, state, noise, lambda drafted: drafted)


def with_draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
    use: Callable[[Drafted], T],
) -> T:
    """What `use` makes of the text's draft where that is enough, else of the model's.

    Args:
      model: it drafts, unless the config has a source of drafts.
      config: how to draft.
      params: the model's parameters.
      state: before the draft.
      noise: of `text_noise`.
      use: is traced for each of the two, so that they may differ in length.
    """
    text = text_draft(model, config, state)
    short = config_of_model_drafts(config, state)

    def of_model() -> T:
        drafted = model_draft(passes.denoising(model), short or config, params, state, noise)
        return use(drafted if text is None or short else text.in_place_of(drafted))

    if text is None:
        return of_model()
    if text.found is None:
        return use(text.drafted())
    of_text = text.drafted()
    return jax.lax.cond(text.is_enough(state.finished), lambda: use(of_text), of_model)


def text_draft(
    model: CausalModel, config: SamplingConfig, state: LosslessState
) -> TextDraft | None:
    """What the config's source, or a lookup, offers out of the text; None where only the model
    drafts."""
    if config.drafts is not None:
        return TextDraft(config.drafts.draft(*text_so_far(state)), None)
    if not config.lookup_ngram:
        return None
    source = PromptLookup(draft_length(model, config), max(LONGEST_NGRAM, config.lookup_ngram))
    tokens, matched = source.find(*text_so_far(state))
    return TextDraft(tokens, matched >= config.lookup_ngram)


def model_draft(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
) -> Drafted:
    """The denoiser's draft; arguments as of `draft`."""
    if drafts_in_one_pass(model, config, state):
        light = one_pass_draft(model, config, params, state, noise)
        return Drafted(light.tokens, jnp.ones_like(state.draft_steps), light.finite)
    task = draft_task(model, config, state, noise)
    denoised = denoise_canvas(model, config, params, state.cache, task, config.max_draft_steps)
    return Drafted(drafted_tokens(model, denoised), denoised.steps, denoised.finite)


def text_so_far(state: LosslessState) -> tuple[jax.Array, jax.Array]:
    """Prompts, responses and pending tokens as one text a row, see `history_of`."""
    generation = state.generation
    rows = jnp.arange(len(state.pending))
    response = jnp.pad(generation.tokens, [(0, 0), (0, 1)])
    response = response.at[rows, generation.lengths].set(state.pending)
    return history_of(state.prompt, state.prompt_lengths, response, generation.lengths + 1)


def drafts_in_one_pass(model: CausalModel, config: SamplingConfig, state: LosslessState) -> bool:
    """Whether a light denoiser drafts, and nothing is asked that takes a canvas to obey."""
    controls = state.generation.controls
    constrained = (controls.pinned, controls.seed, controls.allowed_sets, controls.automaton)
    is_light = passes.light_config(model) is not None
    return is_light and config.max_draft_steps == 1 and all(c is None for c in constrained)


def one_pass_draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
) -> LightDraft:
    """What a light denoiser drafts after the pending tokens, see `drafts.light_draft`."""
    before = state.generation
    keys = split_rows(fold_in_rows(before.keys, before.canvases))[0]
    canvas = first_canvas(model, config, keys, canvas_length(model, config))
    temperature = before.temperature(config)
    return light_draft(
        model,
        params,
        state.cache,
        canvas,
        state.pending,
        state.hidden,
        state.prompt,
        temperature,
        config.top_k,
        before.top_p(config),
        None if noise is None else noise[:, : draft_length(model, config)],
    )


def draft_task(
    model: CausalModel, config: SamplingConfig, state: LosslessState, noise: jax.Array | None
) -> CanvasTask:
    """The next draft of every row as a canvas to denoise.

    The pending token is the first of the canvas and pinned there; of a model that predicts next
    tokens it is the token before the canvas.
    """
    before, length = state.generation, canvas_length(model, config)
    if passes.predicts_next(model):
        ahead = dataclasses.replace(before, lengths=before.lengths + 1, last_token=state.pending)
        task = canvas_task(model, ahead, length, first=1)
        task = dataclasses.replace(task, automaton_states=_after_pending(state))
        text_noise = None if noise is None else noise[:, :length]
    else:
        task = canvas_task(model, before, length)
        nothing = jnp.full((before.lengths.shape[0], length), OPEN, jnp.int32)
        pinned = hold(task.pinned, nothing).at[:, 0].set(state.pending)
        task = dataclasses.replace(task, pinned=pinned)
        text_noise = None if noise is None else jnp.roll(noise, 1, axis=1)[:, :length]
    return dataclasses.replace(
        task,
        keys=split_rows(task.keys)[0],
        max_steps=state.draft_steps,
        text_noise=text_noise,
        teacher_state=state.hidden,
    )


def _after_pending(state: LosslessState) -> jax.Array | None:
    states, automaton = state.generation.automaton_states, state.generation.controls.automaton
    if states is None or automaton is None:
        return None
    return trace(automaton, states, state.pending[:, None])[:, 1]


def drafted_tokens(model: CausalModel, denoised: DenoiseState) -> jax.Array:
    """The draft [B, K] out of a denoised canvas: what follows the pending token."""
    return denoised.argmax if passes.predicts_next(model) else denoised.argmax[:, 1:]
