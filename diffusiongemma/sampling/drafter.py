"""Drafts of the lossless mode: copied from the text so far if it has a match, else the model's."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import trace
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import OPEN
from diffusiongemma.sampling.diffusion import canvas_task, denoise_canvas
from diffusiongemma.sampling.drafts import LightDraft, PromptLookup, history_of, light_draft
from diffusiongemma.sampling.interface import (
    CausalModel,
    DenoisingModel,
    denoising,
    light_config,
    traits,
)
from diffusiongemma.sampling.noise import first_canvas, hold
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

# A lookup searches for matches of up to this many tokens, or `lookup_ngram` if that is more.
LONGEST_NGRAM = 6


@flax.struct.dataclass
class LosslessState:
    """The state of the loop of the lossless mode.

    Attributes:
      generation: the emitted tokens and the K/V cache.
      pending: [B] int32, the next token of each row, drawn but neither emitted nor cached.
      hidden: [B, D], the final hidden state of the last encoded token of each row.
      prompt: [B, P] int32 prompts, right-padded.
      prompt_lengths: [B] int32, the number of tokens of each prompt.
      draft_steps: [B] int32, the maximum number of denoise steps of the next draft of each row.
      accepted_lengths: [B, K + 2] int32, entry n counts the verifications that emitted n tokens.
      pending_scores: [B, 1], the scores of the pending tokens; None unless the config has
        logprobs.
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
        """Replaces the rows in `slots` by those of `new`, see `GenerationState.insert`."""

        def put(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[slots].set(rows, mode='drop')

        generation = self.generation.insert(new.generation, slots)
        return map_but(put, self, new, generation=generation)

    def output(self) -> SamplerOutput:
        output = self.generation.output()
        return dataclasses.replace(output, accepted_lengths=self.accepted_lengths)


class Drafted(NamedTuple):
    """A draft of every row to verify.

    Attributes:
      tokens: [B, K] int32, the draft tokens after the pending tokens.
      steps: [B] int32, the number of denoise passes of the draft.
      finite: [B] bool, whether the logits of these passes are finite.
    """

    tokens: jax.Array
    steps: jax.Array
    finite: jax.Array


def draft_length(model: CausalModel, config: SamplingConfig) -> int:
    """Returns K, the number of tokens of a draft without the pending token."""
    if config.drafts is not None:
        return config.drafts.length
    return canvas_length(model, config) - (0 if traits(model).predict_next else 1)


def canvas_length(model: CausalModel, config: SamplingConfig) -> int:
    """Returns the number of tokens of the canvas that a draft is denoised in."""
    return config.draft_length or traits(model).canvas_length


def config_of_model_drafts(config: SamplingConfig, state: LosslessState) -> SamplingConfig | None:
    """Returns a config with `model_draft_length` as its draft length, or None if not applicable.

    All drafts that are verified together have the same length. In a batch, a lookup can draft for
    some rows and the model for others, so separate lengths require a batch of one row.
    """
    if config.model_draft_length is None or state.pending.shape[0] > 1:
        return None
    return dataclasses.replace(
        config, draft_length=config.model_draft_length, model_draft_length=None
    )


class TextDraft(NamedTuple):
    """A draft of every row that is copied from the text so far.

    Attributes:
      tokens: [B, K] int32, the draft tokens after the pending tokens.
      matches: [B] bool, the rows that use this draft instead of the model's; None if all rows do.
    """

    tokens: jax.Array
    matches: jax.Array | None

    def is_enough(self, finished: jax.Array) -> jax.Array | bool:
        """Returns whether no row needs a draft of the model, except for `finished` rows [B]."""
        return True if self.matches is None else jnp.all(self.matches | finished)

    def drafted(self) -> Drafted:
        """Returns this draft for all rows, without denoise passes."""
        rows = self.tokens.shape[0]
        return Drafted(self.tokens, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))

    def in_place_of(self, drafted: Drafted) -> Drafted:
        """Returns the drafts of the model, replaced by this draft in the rows that match."""
        if self.matches is None:
            return self.drafted()
        return Drafted(
            tokens=jnp.where(self.matches[:, None], self.tokens, drafted.tokens),
            steps=jnp.where(self.matches, 0, drafted.steps),
            finite=self.matches | drafted.finite,
        )


def draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
) -> Drafted:
    """Returns drafts [B, K] after the pending tokens; `model_draft_length` is ignored.

    Args:
      model, config, params, state, noise: see `with_draft`.
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
    """Returns the result of `use` for a draft from the text, or from the model where needed.

    Args:
      model: the model that drafts, unless the config has a source of drafts.
      config: the sampling settings.
      params: the parameters of the model.
      state: the state before the draft.
      noise: the result of `text_noise`.
      use: a function of the draft. It is traced separately for both kinds of draft, so their
        lengths may differ.
    """
    text = text_draft(model, config, state)
    short = config_of_model_drafts(config, state)

    def use_model() -> T:
        drafted = model_draft(denoising(model), short or config, params, state, noise)
        return use(drafted if text is None or short else text.in_place_of(drafted))

    if text is None:
        return use_model()
    copied = text.drafted()
    if text.matches is None:
        return use(copied)
    result: T = jax.lax.cond(text.is_enough(state.finished), lambda: use(copied), use_model)
    return result


def text_draft(
    model: CausalModel, config: SamplingConfig, state: LosslessState
) -> TextDraft | None:
    """Returns the draft of the config's source or lookup; None if only the model drafts."""
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
    """Returns the draft of the denoiser; the arguments are those of `draft`."""
    if drafts_in_one_pass(model, config, state):
        light = one_pass_draft(model, config, params, state, noise)
        return Drafted(light.tokens, jnp.ones_like(state.draft_steps), light.finite)
    task = draft_task(model, config, state, noise)
    denoised = denoise_canvas(model, config, params, state.cache, task, config.max_draft_steps)
    return Drafted(drafted_tokens(model, denoised), denoised.steps, denoised.finite)


def text_so_far(state: LosslessState) -> tuple[jax.Array, jax.Array]:
    """Returns prompts, responses and pending tokens as one text per row, see `history_of`."""
    generation = state.generation
    rows = jnp.arange(len(state.pending))
    response = jnp.pad(generation.tokens, [(0, 0), (0, 1)])  # [B, N + 1]
    response = response.at[rows, generation.lengths].set(state.pending)
    return history_of(state.prompt, state.prompt_lengths, response, generation.lengths + 1)


def drafts_in_one_pass(model: CausalModel, config: SamplingConfig, state: LosslessState) -> bool:
    """Returns whether a light denoiser drafts in one pass, without constraints on the canvas."""
    controls = state.generation.controls
    constrained = (controls.pinned, controls.seed, controls.allowed_sets, controls.automaton)
    is_light = light_config(model) is not None
    return is_light and config.max_draft_steps == 1 and all(c is None for c in constrained)


def one_pass_draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    noise: jax.Array | None,
) -> LightDraft:
    """Returns the draft of a light denoiser after the pending tokens, see `drafts.light_draft`."""
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
    """Returns the task of the canvas that is the next draft of every row.

    The pending token is pinned at the first position of the canvas. For a denoiser with
    `predict_next` it is the token before the canvas instead.
    """
    before, length = state.generation, canvas_length(model, config)
    if traits(model).predict_next:
        ahead = dataclasses.replace(before, lengths=before.lengths + 1, last_token=state.pending)
        task = canvas_task(model, ahead, length, first=1)
        task = dataclasses.replace(task, automaton_states=_after_pending(state))
        text_noise = None if noise is None else noise[:, :length]  # [B, C, V]
    else:
        task = canvas_task(model, before, length)
        unpinned = jnp.full((before.lengths.shape[0], length), OPEN, jnp.int32)
        pinned = hold(task.pinned, unpinned).at[:, 0].set(state.pending)
        task = dataclasses.replace(task, pinned=pinned)
        # Noise i is for canvas position i + 1, because position 0 is the pending token.
        text_noise = None if noise is None else jnp.roll(noise, 1, axis=1)[:, :length]
    return dataclasses.replace(
        task,
        keys=split_rows(task.keys)[0],
        max_steps=state.draft_steps,
        text_noise=text_noise,
        teacher_state=state.hidden,
    )


def _after_pending(state: LosslessState) -> jax.Array | None:
    """Returns the automaton's states [B] after the pending tokens, or None without automaton."""
    states, automaton = state.generation.automaton_states, state.generation.controls.automaton
    if states is None or automaton is None:
        return None
    return trace(automaton, states, state.pending[:, None])[:, 1]


def drafted_tokens(model: CausalModel, denoised: DenoiseState) -> jax.Array:
    """Returns the draft [B, K] from a denoised canvas: the tokens after the pending token."""
    return denoised.argmax if traits(model).predict_next else denoised.argmax[:, 1:]
