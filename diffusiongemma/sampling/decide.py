"""Typed decisions: one denoise pass computes the probabilities of a fixed set of answers."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.models.arrays import AnyArray, Params
from diffusiongemma.sampling import diffusion, passes
from diffusiongemma.sampling.controls import OPEN, Controls
from diffusiongemma.sampling.interface import denoising, traits
from diffusiongemma.sampling.sampler import Sampler, prefilled
from diffusiongemma.sampling.state import CanvasTask


def decide(
    sampler: Sampler,
    params: Params,
    tokens: AnyArray,
    lengths: AnyArray,
    answers: Sequence[Sequence[int]],
    *,
    rng: jax.Array,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    num_draws: int = 1,
) -> jax.Array:
    """Returns the probability of each answer in a response that reads `before`, answer, `after`.

    The canvas starts with `before`; all other positions are noise. The score of an answer is the
    product of the probabilities of its tokens and of `after` at their positions; scores are
    normalized over the answers.

    Args:
      sampler: a sampler of a diffusion model; only the noise settings of its config are used.
      params: the parameters of the model.
      tokens: [B, P] integer prompts, right-padded.
      lengths: [B] integer, the prompt lengths.
      answers: the token ids of A answers, none of them empty.
      rng: one key, or one per row [B].
      before: tokens of the response before the answer.
      after: tokens after the answer that mark its end, such as a full stop or the stop token.
        Required if the answers have different lengths.
      num_draws: the number of passes with independent noise whose probabilities are averaged.

    Returns:
      [B, A] float32; each row sums to 1.

    Raises:
      ValueError: if a call of the sampler would raise it, or if the answers are invalid or do not
        fit into a canvas.
    """
    tokens, lengths, rng, _ = sampler.checked(tokens, lengths, rng, None)
    options = [[*answer, *after] for answer in answers]
    widths = {len(answer) for answer in answers}
    length = traits(sampler.model).canvas_length
    if not options or 0 in widths:
        raise ValueError(f'answers must be token ids, at least one each, got {list(answers)}.')
    if len(widths) > 1 and not after:
        raise ValueError(
            'The answers differ in length: pass the tokens that follow them as `after`, for '
            'example the stop token, so that no answer is a prefix of another one.'
        )
    if len(before) + max(map(len, options)) > length:
        raise ValueError(
            f'`before`, the longest answer and `after` have {len(before)} + '
            f'{max(map(len, options))} tokens; a canvas has {length}.'
        )
    if num_draws < 1:
        raise ValueError(f'num_draws must be >= 1, got {num_draws}.')
    option_tokens = np.full((len(options), length), OPEN)  # [A, C]
    for row, option in zip(option_tokens, options, strict=True):
        row[len(before) : len(before) + len(option)] = option
    pinned = np.full(length, OPEN)
    pinned[: len(before)] = before
    probabilities: jax.Array = _decide(
        sampler,
        num_draws,
        params,
        tokens,
        lengths,
        rng,
        jnp.asarray(option_tokens),
        jnp.asarray(pinned),
    )
    return probabilities


@functools.partial(jax.jit, static_argnames=('sampler', 'num_draws'))
def _decide(
    sampler: Sampler,
    num_draws: int,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
    option_tokens: jax.Array,
    pinned: jax.Array,
) -> jax.Array:
    """Returns the probabilities [B, A].

    `option_tokens` [A, C] has each answer with `after`, `pinned` [C] has `before`; both at their
    positions in the canvas, and OPEN elsewhere.
    """
    model, config = denoising(sampler.model), sampler.config
    state, _ = prefilled(model, config, params, tokens, lengths, rng, Controls())
    pinned = jnp.broadcast_to(pinned, (tokens.shape[0], pinned.size))  # [B, C]

    def probabilities(draw: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, draw)
        task = CanvasTask(keys, ~state.finished, state.last_token, pinned=pinned)
        noisy = diffusion.first_noise(model, config, params, task)
        logits = passes.denoise(
            model, params, state.cache, noisy.canvas, noisy.soft_embeddings, task.last_token
        )
        log_probs = jax.nn.log_softmax(logits, axis=-1)  # [B, C, V]
        chosen = jnp.take_along_axis(
            log_probs, jnp.maximum(option_tokens, 0).T[None], axis=-1
        )  # [B, C, A]
        scores = jnp.sum(jnp.where(option_tokens.T == OPEN, 0.0, chosen), axis=1)  # [B, A]
        return jax.nn.softmax(scores, axis=-1)

    return jnp.mean(jax.lax.map(probabilities, jnp.arange(num_draws)), axis=0)  # [B, A]
