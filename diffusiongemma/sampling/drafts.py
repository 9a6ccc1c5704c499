"""Sources of drafts for the lossless mode: a light denoiser, or earlier text."""

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

MAX_NGRAM = 64  # the maximum length of an n-gram; the compiled code of a lookup grows with it


class DraftSource(Protocol):
    """A source of drafts without a model; hashable, as `SamplingConfig.drafts` requires."""

    @property
    def length(self) -> int:
        """Returns the number of tokens of a draft."""
        ...

    def draft(self, history: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns drafts [B, length] int32 after the first lengths [B] tokens of history [B, S]."""
        ...


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """A source that copies what followed the latest earlier occurrence of the last few tokens.

    It needs no training and is the baseline of every learned draft (prompt lookup decoding,
    Saxena 2023; in transformers `prompt_lookup_num_tokens`).

    Attributes:
      length: the number of tokens of a draft.
      max_ngram: the number of last tokens to search for; if they do not occur earlier, fewer
        tokens are searched for.
    """

    length: int = 8
    max_ngram: int = 3

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f'length must be >= 1, got {self.length}.')
        if not 1 <= self.max_ngram <= MAX_NGRAM:
            raise ValueError(f'max_ngram must be 1 to {MAX_NGRAM} tokens, got {self.max_ngram}.')

    def draft(self, history: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns drafts, see `DraftSource`; undefined if the last token does not occur earlier."""
        return self.find(history, lengths)[0]

    def find(self, history: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns drafts [B, length] and the number of last tokens that matched, [B] int32."""
        size = history.shape[1]
        index = jnp.arange(size)
        last = lengths[:, None] - 1  # [B, 1]
        run = jnp.ones(history.shape, bool)  # [B, S], whether the text matches up to here
        matched = jnp.zeros(history.shape, jnp.int32)  # [B, S], matching tokens that end here
        for k in range(self.max_ngram):
            suffix = jnp.take_along_axis(history, jnp.maximum(last - k, 0), axis=1)
            earlier = jnp.take_along_axis(history, jnp.maximum(index - k, 0)[None], axis=1)
            run &= (suffix == earlier) & (index >= k) & (last >= k)
            matched += run
        matched = jnp.where(index < last, matched, 0)
        # Of the longest matches, the latest one.
        best = jnp.argmax(matched * size + index, axis=1)  # [B]
        places = best[:, None] + 1 + jnp.arange(self.length)  # [B, length]
        # If the copy reaches the end of the text, it continues periodically.
        period = jnp.maximum(last[:, 0] - best, 1)[:, None]
        beyond = jnp.maximum(places - last, 0)
        places -= -(-beyond // period) * period
        return jnp.take_along_axis(history, places, axis=1), jnp.max(matched, axis=1)


def history_of(
    prompt: jax.Array, prompt_lengths: jax.Array, response: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins prompts and responses into one text per row.

    Args:
      prompt: [B, P] int32, right-padded.
      prompt_lengths: [B] int32.
      response: [B, N] int32.
      lengths: [B] int32, the number of tokens of each response.

    Returns:
      [B, P + N] int32, and the lengths [B] int32; tokens after them are undefined.
    """
    index = jnp.arange(prompt.shape[1] + response.shape[1])
    in_response = index - prompt_lengths[:, None]  # [B, P + N], < 0 in the prompt
    text = jnp.where(
        in_response < 0,
        jnp.take_along_axis(prompt, jnp.minimum(index, prompt.shape[1] - 1)[None], axis=1),
        jnp.take_along_axis(response, jnp.clip(in_response, 0, response.shape[1] - 1), axis=1),
    )
    return text, prompt_lengths + lengths


class LightDraft(NamedTuple):
    """The draft of a light denoiser from one pass.

    Attributes:
      tokens: [B, K] int32, the draft tokens.
      entropies: [B, K] float32, the marginal entropy of each position in nats.
      finite: [B] bool, whether the logits of the chosen tokens are finite.
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
    """Drafts with one pass of a light denoiser, its draft vocabulary and the serial correction.

    Args:
      model: a DiffusionGemma with a light denoiser.
      params: the parameters of the model.
      cache: the K/V cache of the tokens before the pending one.
      canvas: [B, C] int32 noise.
      pending: [B] int32, the next token of each row, which is known but not yet encoded.
      hidden: [B, D], final hidden states of the last encoded tokens.
      prompt: [B, P] int32; these tokens are added to a draft vocabulary.
      temperature, top_k, top_p: the settings of the drafted text, see `adjust`.
      noise: [B, K, V] float32, the Gumbel noise of the text, or None for greedy text.
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
        drafted_noise = jnp.take_along_axis(noise, tokens[:, None], axis=-1)  # [B, K, Vd + P]

    def choose(
        logits: jax.Array, noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:  # [B, k] tokens and [B, k] whether they are finite
        adjusted = adjust(logits, temperature, top_k, top_p)
        columns = pick(adjusted, temperature, noise)  # [B, k], columns of `tokens`
        return jnp.take_along_axis(tokens, columns, axis=1), chosen_are_finite(adjusted, columns)

    if light.serial_rank:
        drafted, finite = _left_to_right(
            model, variables, logits, size, pending, drafted_noise, choose
        )
    else:
        drafted, finite = choose(logits, drafted_noise)
    return LightDraft(drafted, entropy(logits), jnp.all(finite, axis=-1))


def _with_prompt_tokens(
    model: Any,
    variables: dict[str, Any],
    hidden: jax.Array,
    logits: jax.Array,
    tokens: jax.Array,
    prompt: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns logits [B, K, Vd + P] and token ids [B, Vd + P] that include the prompt's tokens."""
    _, known = model.apply(variables, prompt, method='draft_rows')  # [B, P]
    more = model.apply(variables, hidden, prompt, method='score_tokens')  # [B, K, P]
    more = jnp.where(known[:, None], -jnp.inf, more)  # avoids duplicates
    return jnp.concatenate([logits, more], axis=-1), jnp.concatenate([tokens, prompt], axis=1)


def _left_to_right(
    model: Any,
    variables: dict[str, Any],
    logits: jax.Array,
    size: int,
    pending: jax.Array,
    noise: jax.Array | None,
    choose: Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Returns the draft [B, K] with x_i = choose(logits_i + serial(x_(i-1))), and finite [B, K].

    Applying the equations to all positions at once until nothing changes would give the same
    draft, but it takes nearly as many rounds as there are positions (10.5 rounds for 12 tokens of
    word problems), and each of them computes all positions.

    Args:
      model, variables: the model and its parameters.
      logits: [B, K, Vd + P] float32, without the serial correction.
      size: Vd, the number of tokens that have a serial correction.
      pending: [B] int32, the tokens before the draft.
      noise: [B, K, Vd + P] float32, or None.
      choose: returns the tokens of logits [B, 1, Vd + P], and whether these are finite.
    """

    def next_token(
        previous: jax.Array, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits, noise = inputs  # [B, 1, Vd + P]
        serial = model.apply(variables, previous[:, None], method='serial_logits')  # [B, 1, Vd]
        serial = jnp.pad(serial, [(0, 0), (0, 0), (0, logits.shape[-1] - size)])  # [B, 1, Vd + P]
        token, finite = choose(logits + serial, noise)
        return token[:, 0], (token[:, 0], finite[:, 0])

    by_position = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 1, 0)[:, :, None], (logits, noise)
    )  # [K, B, 1, Vd + P]
    _, (drafted, finite) = jax.lax.scan(next_token, pending, by_position)  # [K, B]
    return drafted.T, finite.T
