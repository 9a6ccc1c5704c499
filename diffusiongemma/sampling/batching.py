"""Many prompts through a batch of few rows that is kept full."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.finite import check_finite
from diffusiongemma.sampling.lossless import draft_length
from diffusiongemma.sampling.randomness import row_keys
from diffusiongemma.sampling.sampler import MODES, Sampler, pad_prompts
from diffusiongemma.sampling.state import GenerationState, SamplerOutput


def generate_many(
    sampler: Sampler,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    rng: jax.Array,
    batch_size: int = 8,
    controls: Controls | None = None,
    multiple: int = 64,
) -> SamplerOutput:
    """Answers any number of prompts; a row that finishes gives its place to the next prompt.

    Between two refills everything is one compiled program. A response is the one that a call of
    `sampler` with all prompts in one batch would give, up to the order of float sums.

    Args:
      sampler: any mode.
      params: the model's parameters.
      prompts: token ids of N prompts.
      rng: one key, of which prompt n uses `fold_in(rng, n)`, or one key per prompt [N].
      batch_size: rows at once.
      controls: of all N prompts.
      multiple: prompts are padded to a common width, a multiple of it.

    Returns:
      The outputs in the order of the prompts, as numpy arrays with N rows.

    Raises:
      ValueError, FloatingPointError: as a call of the sampler; ValueError also when
        batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size must be >= 1 row, got {batch_size}.')
    tokens, lengths = pad_prompts(prompts, sampler.config.pad_id, multiple=multiple)
    tokens, lengths, rng, controls = sampler.checked(tokens, lengths, rng, controls)
    queue = _Queue(sampler, params, tokens, lengths, row_keys(rng, len(prompts)), controls)
    mode = MODES[sampler.mode]
    owners = np.arange(min(batch_size, len(prompts)))  # which prompt each row answers
    state = queue.start(owners)
    following, done = len(owners), np.zeros(len(owners), bool)
    while not done.all():
        state = mode.until_one_finishes(sampler.model, sampler.config, params, state)
        finished = np.asarray(state.finished) & ~done
        queue.collect(state.output(), np.flatnonzero(finished), owners)
        check_finite(queue.results.failed_pass)
        done |= finished
        free = np.flatnonzero(finished)[: len(prompts) - following]
        if free.size:
            owners[free] = np.arange(following, following + free.size)
            state = _insert(state, *queue.start_padded(owners[free], free, len(owners)))
            following += free.size
            done[free] = False
    return queue.results


class _Queue:
    """The prompts, how rows start with them, and what came of them."""

    def __init__(
        self,
        sampler: Sampler,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        keys: jax.Array,
        controls: Controls,
    ):
        self._sampler, self._params = sampler, params
        self._tokens, self._lengths, self._keys = tokens, lengths, keys
        self._controls = controls
        count = len(lengths)
        zeros = np.zeros(count, np.int32)
        shape = (count, sampler.config.max_new_tokens)
        accepted = None
        if sampler.mode == 'lossless':
            bins = draft_length(sampler.model, sampler.config) + 2
            accepted = np.zeros((count, bins), np.int32)
        self.results = SamplerOutput(
            tokens=np.full(shape, sampler.config.pad_id, np.int32),
            lengths=zeros,
            denoising_steps=zeros.copy(),
            canvases=zeros.copy(),
            causal_passes=zeros.copy(),
            failed_pass=zeros.copy(),
            accepted_lengths=accepted,
        )

    def start(self, indices: np.ndarray) -> GenerationState:
        """Rows at the beginning of their responses to some of the prompts."""
        return MODES[self._sampler.mode].start(
            self._sampler.model,
            self._sampler.config,
            self._params,
            self._tokens[indices],
            self._lengths[indices],
            self._keys[indices],
            self._controls.map_rows(lambda array: array[indices]),
        )

    def start_padded(
        self, indices: np.ndarray, slots: np.ndarray, batch_size: int
    ) -> tuple[GenerationState, jax.Array]:
        """New rows for some slots, as many as the next power of two, so that few shapes compile."""
        extra = 2 ** int(np.ceil(np.log2(len(indices)))) - len(indices)
        indices = np.append(indices, np.repeat(indices[:1], extra))
        return self.start(indices), jnp.asarray(np.append(slots, np.repeat(batch_size, extra)))

    def collect(self, output: SamplerOutput, rows: np.ndarray, owners: np.ndarray) -> None:
        """Keeps the results of rows that have finished."""

        def keep(results: np.ndarray, values: jax.Array) -> None:
            results[owners[rows]] = np.asarray(values)[rows]

        jax.tree.map(keep, self.results, output)


@jax.jit
def _insert(state: GenerationState, new: GenerationState, slots: jax.Array) -> GenerationState:
    return state.insert(new, slots)
