"""Where the drafts of the lossless mode come from: the model's denoiser, or the text itself."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.epilogue import adjust, entropy, pick
from diffusiongemma.sampling.finite import chosen_are_finite


class DraftSource(Protocol):
    """Drafts without a model; hashable, so that `SamplingConfig.drafts` can hold it."""

    @property
    def length(self) -> int:
        """Tokens of a draft."""
        ...

    def draft(self, history: jax.Array, lengths: jax.Array) -> jax.Array:
        """Tokens [B, length] int32 that may follow the first lengths [B] of history [B, S]."""
        ...


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the latest earlier occurrence of the last few tokens.

    Needs no training, and is what every learned draft has to beat (prompt lookup decoding,
    Saxena 2023; in transformers `prompt_lookup_num_tokens`).

    Attributes:
      length: tokens of a draft.
      max_ngram: the longest run of last tokens that is looked for; where it does not occur
        earlier, shorter ones are.
    """

    length: int = 8
    max_ngram: int = 3

    def __post_init__(self) -> None:
        if self.length < 1 or self.max_ngram < 1:
            raise ValueError(
                f'length and max_ngram must be >= 1, got {self.length} and {self.max_ngram}.'
            )

    def draft(self, history: jax.Array, lengths: jax.Array) -> jax.Array:
        """See `DraftSource`; where no last token occurs earlier the draft means nothing."""
        return self.find(history, lengths)[0]

    def find(self, history: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The draft [B, length], and how many of the last tokens [B] int32 it continues."""
        size = history.shape[1]
        index = jnp.arange(size)
        last = lengths[:, None] - 1  # [B, 1]
        run = jnp.ones(history.shape, bool)
        matched = jnp.zeros(history.shape, jnp.int32)  # [B, S], tokens up to here that match
        for k in range(self.max_ngram):
            ours = jnp.take_along_axis(history, jnp.maximum(last - k, 0), axis=1)
            theirs = jnp.take_along_axis(history, jnp.maximum(index - k, 0)[None], axis=1)
            run &= (ours == theirs) & (index >= k) & (last >= k)
            matched += run
        matched = jnp.where(index < last, matched, 0)
        # Of the longest matches the latest.
        best = jnp.argmax(matched * size + index, axis=1)
        places = best[:, None] + 1 + jnp.arange(self.length)
        # A run that reaches the end of the text is taken to go on in the same period.
        period = jnp.maximum(last[:, 0] - best, 1)[:, None]
        beyond = jnp.maximum(places - last, 0)
        places -= -(-beyond // period) * period
        return jnp.take_along_axis(history, places, axis=1), jnp.max(matched, axis=1)


def history_of(
    prompt: jax.Array, prompt_lengths: jax.Array, response: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Prompts and responses as one text a row.

    Args:
      prompt: [B, P] int32, right-padded.
      prompt_lengths: [B] int32.
      response: [B, N] int32.
      lengths: [B] int32, tokens of the responses.

    Returns:
      [B, P + N] int32, and its lengths [B] int32; what is after them means nothing.
    """
    index = jnp.arange(prompt.shape[1] + response.shape[1])
    in_response = index - prompt_lengths[:, None]
    both = jnp.where(
        in_response < 0,
        jnp.take_along_axis(prompt, jnp.minimum(index, prompt.shape[1] - 1)[None], axis=1),
        jnp.take_along_axis(response, jnp.clip(in_response, 0, response.shape[1] - 1), axis=1),
    )
    return both, prompt_lengths + lengths


class LightDraft(NamedTuple):
    """What a light denoiser drafts in one pass.

    Attributes:
      tokens: [B, K] int32.
      entropies: [B, K] float32, nats, of each position by itself.
      finite: [B] bool, whether the logits that the tokens were chosen by are finite.
    """

    tokens: jax.Array
    entropies: jax.Array
    finite: jax.Array


def light_draft(
    model: Any,
    params: Params,
    cache: KVCache,
    canvas: jax.Array,
    pending: jax.Array,
    hidden: jax.Array,
    prompt: jax.Array,
    temperature: float | jax.Array,
    top_k: int | None,
    top_p: float | jax.Array | None,
    noise: jax.Array | None,
) -> LightDraft:
    """One pass of a light denoiser, its head over the draft vocabulary, the serial correction.

    Args:
      model: a DiffusionGemma with a light denoiser.
      params: its parameters.
      cache: the tokens before the pending one.
      canvas: [B, C] int32 noise.
      pending: [B] int32, each row's next token, known and not yet encoded.
      hidden: [B, D], final hidden states of the last encoded tokens.
      prompt: [B, P] int32; a draft vocabulary is extended by these tokens.
      temperature, top_k, top_p: of the text that is drafted, see `adjust`.
      noise: [B, K, V] float32, the Gumbel noise that the text is drawn with, or None where it is
        greedy.
    """
    light, variables = model.light, {'params': params}
    output = passes.denoise_hidden(model, params, cache, canvas, pending, hidden)  # [B, K, D]
    logits = model.apply(variables, output, method='draft_logits')  # [B, K, Vd]
    size = logits.shape[-1]
    tokens = model.apply(variables, jnp.arange(size), method='draft_tokens')
    tokens = jnp.broadcast_to(tokens, (logits.shape[0], size))  # [B, Vd]
    if light.draft_vocab_size:
        logits, tokens = _with_prompt_tokens(model, variables, output, logits, tokens, prompt)
    drafted_noise = noise
    if noise is not None and light.draft_vocab_size:
        drafted_noise = jnp.take_along_axis(noise, tokens[:, None], axis=-1)

    def choose(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        adjusted = adjust(logits, temperature, top_k, top_p)
        row = pick(adjusted, temperature, drafted_noise)
        finite = jnp.all(chosen_are_finite(adjusted, row), axis=-1)  # [B]
        return jnp.take_along_axis(tokens, row, axis=1), finite  # [B, K]

    drafted, finite = choose(logits)
    if light.serial_rank:
        drafted, finite = _resolve(model, variables, logits, size, pending, drafted, choose)
    return LightDraft(drafted, entropy(logits), finite)


def _with_prompt_tokens(
    model: Any,
    variables: dict,
    hidden: jax.Array,
    logits: jax.Array,
    tokens: jax.Array,
    prompt: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, K, Vd + P] and their tokens [B, Vd + P]: the prompt's tokens are scored too."""
    _, known = model.apply(variables, prompt, method='draft_rows')  # [B, P]
    more = model.apply(variables, hidden, prompt, method='score_tokens')  # [B, K, P]
    more = jnp.where(known[:, None], -jnp.inf, more)  # once is enough
    return jnp.concatenate([logits, more], axis=-1), jnp.concatenate([tokens, prompt], axis=1)


def _resolve(
    model: Any,
    variables: dict,
    logits: jax.Array,
    size: int,
    pending: jax.Array,
    drafted: jax.Array,
    choose: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """The draft [B, K] that each token continues: x_i = choose(logits_i + serial(x_(i-1))).

    Returned with it is whether its logits are finite [B].

    From left to right these equations have one solution. It is found by applying them to all
    positions at once until nothing changes: position i is right after i rounds at the latest, and
    mostly after two or three.
    """

    def once(drafted: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = jnp.concatenate([pending[:, None], drafted[:, :-1]], axis=1)
        gain = model.apply(variables, before, method='serial_logits')  # [B, K, Vd]
        gain = jnp.pad(gain, [(0, 0), (0, 0), (0, logits.shape[-1] - size)])
        return choose(logits + gain)

    def go_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(carry[0] != carry[1])

    def again(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return carry[1], *once(carry[1])

    unresolved = jnp.full_like(drafted, -1), drafted, jnp.ones(drafted.shape[0], bool)
    _, drafted, finite = jax.lax.while_loop(go_on, again, unresolved)
    return drafted, finite
