"""Answers many prompts with continuous batching: a small batch that is kept full."""

from collections.abc import Sequence

import jax
import numpy as np

from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafter import draft_length
from diffusiongemma.sampling.engine import Engine, Failed, Finished, Result
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.prompts import pad_prompts
from diffusiongemma.sampling.randomness import row_keys
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.scores import TokenScores
from diffusiongemma.sampling.state import SamplerOutput


def generate_many(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    rng: jax.Array,
    batch_size: int = 8,
    controls: Controls | None = None,
    multiple: int = 64,
) -> SamplerOutput:
    """Answers any number of prompts; when a row finishes, the next prompt takes its slot.

    Between two refills everything is one compiled program. The responses are those of a call of
    `sampler` with all prompts in one batch, up to the order of float sums.

    Args:
      sampler: a sampler in any mode.
      params: the parameters of the model.
      prompts: the token ids of N prompts.
      rng: one key, of which prompt n uses `fold_in(rng, n)`, or one key per prompt [N].
      batch_size: the number of rows that are decoded at once.
      controls: settings and constraints with one row per prompt; None for those of the config.
      multiple: prompts are padded to a common width, a multiple of this length.

    Returns:
      The outputs in the order of the prompts, as numpy arrays with N rows.

    Raises:
      ValueError, FloatingPointError: the errors of a call of the sampler; ValueError also if
        batch_size < 1 or there are no prompts.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size must be >= 1 row, got {batch_size}.')
    tokens, lengths = pad_prompts(prompts, sampler.config.pad_id, multiple=multiple)
    _, _, rng, controls = sampler.checked(tokens, lengths, rng, controls)
    width, count = tokens.shape[1], len(prompts)
    capacity = width + sampler.config.max_new_tokens
    positions = traits(sampler.model).max_positions
    engine = Engine(
        sampler,
        params,
        slots=min(batch_size, count),
        capacity=min(capacity, positions or capacity),
        multiple=width,
        prefill_together=batch_size,
    )
    keys = row_keys(rng, count)
    owners = {}
    for n, prompt in enumerate(prompts):
        row = controls.map_rows(lambda array, n=n: np.asarray(array[n : n + 1]))
        owners[engine.submit(prompt, rng=keys[n : n + 1], controls=row)] = n
    results: list[Result | None] = [None] * count
    for event in engine.run(until_one_finishes=True):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            results[owners[event.id]] = event.result
    return _collected(sampler, results)


def _collected(sampler: Sampler, results: Sequence[Result | None]) -> SamplerOutput:
    """Returns the output of all prompts; a row without a result is empty."""
    count = len(results)
    tokens = np.full((count, sampler.config.max_new_tokens), sampler.config.pad_id, np.int32)
    lengths, denoising_steps, canvases, causal_passes = np.zeros((4, count), np.int32)  # [N] each
    accepted = None
    if sampler.mode == 'lossless':
        bins = draft_length(sampler.model, sampler.config) + 2
        accepted = np.zeros((count, bins), np.int32)
    scores, logprobs = None, sampler.config.logprobs
    if logprobs is not None:
        empty = TokenScores.empty(count, sampler.config.max_new_tokens, logprobs)
        scores = jax.tree.map(np.array, empty)
    for row, result in enumerate(results):
        if result is None:
            continue
        tokens[row, : len(result.tokens)] = result.tokens
        lengths[row] = len(result.tokens)
        denoising_steps[row] = result.denoising_steps
        canvases[row] = result.canvases
        causal_passes[row] = result.causal_passes
        if accepted is not None and result.accepted_lengths is not None:
            accepted[row] = result.accepted_lengths
        for whole, part in zip(*map(jax.tree.leaves, (scores, result.scores)), strict=True):
            whole[row, : len(result.tokens)] = part
    return SamplerOutput(
        tokens=tokens,
        lengths=lengths,
        denoising_steps=denoising_steps,
        canvases=canvases,
        causal_passes=causal_passes,
        failed_pass=np.zeros(count, np.int32),
        accepted_lengths=accepted,
        scores=scores,
    )
