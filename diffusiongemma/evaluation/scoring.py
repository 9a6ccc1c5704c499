"""Scores responses under the teacher: the log-probability of every token, in one causal pass."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.models.arrays import Params
from diffusiongemma.parallel import processes
from diffusiongemma.sampling import pad_prompts
from diffusiongemma.sampling.interface import CausalModel


def response_log_probs(
    model: CausalModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int,
    multiple: int = 64,
) -> list[np.ndarray]:
    """Returns log p(token | prompt, earlier response tokens) for all tokens of all responses.

    Args:
      model: the scoring model, whose causal pass is used.
      params: the parameters of the model.
      prompts: the token ids of each prompt, at least one.
      responses: the token ids of each response, including the stop token.
      batch_size: the number of responses per pass.
      multiple: prompt and response together are padded to a multiple of this number of tokens.

    Returns:
      For each response a float32 array [tokens of the response], in nats.
    """
    log_probs = []
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        pairs = list(zip(prompts[rows], responses[rows], strict=True))
        tokens, lengths = pad_prompts([[*p, *r] for p, r in pairs], multiple=multiple)
        batch = processes.on_host(_next_token_log_probs(model, params, tokens, lengths))
        for row, (prompt, response) in zip(batch, pairs, strict=True):
            log_probs.append(row[len(prompt) - 1 : len(prompt) - 1 + len(response)])
    return log_probs


@functools.partial(jax.jit, static_argnames='model')
def _next_token_log_probs(
    model: CausalModel, params: Params, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Returns the log-probabilities [B, L - 1] float32 of all tokens [B, L] except the first."""
    variables = {'params': params}
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(index, tokens.shape)
    segment_ids = (index < lengths[:, None]).astype(jnp.int32)  # [B, L]
    hidden, _ = model.apply(variables, tokens, positions, segment_ids, method='encode')

    def score(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = row  # [L - 1, D], [L - 1]
        logits = model.apply(variables, hidden, method='unembed')  # [L - 1, V]
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]

    # Row by row, because with a large vocabulary the logits of a whole batch would not fit.
    scores: jax.Array = jax.lax.map(score, (hidden[:, :-1], tokens[:, 1:]))
    return scores
