"""Decodes examples for an evaluation and counts passes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.errors import check_range
from diffusiongemma.evaluation.scoring import response_log_probs
from diffusiongemma.models.arrays import Params
from diffusiongemma.parallel import processes
from diffusiongemma.sampling import Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.state import SamplerOutput

Examples = Sequence[Mapping[str, Any]]
Contestant = tuple[Sampler, Any]  # a sampler and its parameters
# Iterates over parts of a task and shows the progress with a description.
Watch = Callable[[Sequence[Any], str], Iterable[Any]]


def unwatched(parts: Sequence[Any], description: str) -> Iterable[Any]:
    """Returns the parts without any progress display."""
    del description
    return parts


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Settings for the size of an evaluation.

    Attributes:
      batch_size: the number of rows decoded at once for the accuracy.
      speed_batch_sizes: the batch sizes at which speed is measured, the main one first.
      speed_batches: the number of timed batches of the main size. Other sizes time the same
        number of prompts, but at least five batches (or this number, if it is smaller).
      prompt_multiple: prompts are padded to a multiple of this number of tokens, which limits the
        number of compiled programs.
    """

    batch_size: int = 32
    speed_batch_sizes: tuple[int, ...] = (1, 8)
    speed_batches: int = 24
    prompt_multiple: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, 'speed_batch_sizes', tuple(self.speed_batch_sizes))
        if not self.speed_batch_sizes:
            raise ValueError('speed_batch_sizes is empty; (1,) measures one row at a time.')
        for field in dataclasses.fields(EvalConfig):
            check_range(field.name, min(np.atleast_1d(getattr(self, field.name))), 1)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The responses to all examples, with pass counts that are summed over all examples.

    Attributes:
      responses: the text of each response.
      tokens: the token ids of each response, including the stop token.
      passes: the number of denoise passes (autoregressive mode: forward passes).
      causal_passes: the number of commit and verify passes; 0 in autoregressive mode.
      canvases: the number of canvases; 0 in autoregressive mode.
      accepted_lengths: [K + 2], the sum of `SamplerOutput.accepted_lengths`; None outside of the
        lossless mode.
    """

    responses: list[str]
    tokens: list[list[int]]
    passes: int
    causal_passes: int
    canvases: int
    accepted_lengths: np.ndarray | None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_denoise_pass(self) -> float:
        """Returns the tokens per denoise pass; 1 in autoregressive mode."""
        return self.num_tokens / max(self.passes, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Returns the tokens per pass; denoise, commit and verify passes count, prefills do not."""
        return self.num_tokens / max(self.passes + self.causal_passes, 1)

    @property
    def steps_per_canvas(self) -> float:
        """Returns the denoise passes per canvas."""
        return self.passes / max(self.canvases, 1)


def decode(
    sampler: Sampler,
    params: Params,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    watch: Watch = unwatched,
    name: str = 'answering',
) -> Decoded:
    """Decodes responses to all examples, `config.batch_size` rows at once, one key per row."""
    responses: list[str] = []
    tokens: list[list[int]] = []
    passes = causal_passes = canvases = 0
    accepted: np.ndarray | None = None
    keys = jax.random.split(rng, len(examples))
    for first in watch(range(0, len(examples), config.batch_size), name):
        chunk = examples[first : first + config.batch_size]
        output = run_batch(
            sampler, params, tokenizer, chunk, config, keys[first : first + len(chunk)]
        )
        responses += decode_responses(tokenizer, output)
        rows, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
        tokens += [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
        passes += int(np.sum(output.denoising_steps))
        causal_passes += int(np.sum(output.causal_passes))
        canvases += int(np.sum(output.canvases))
        if output.accepted_lengths is not None:
            counts = np.sum(output.accepted_lengths, axis=0)  # [K + 2]
            accepted = counts if accepted is None else accepted + counts
    return Decoded(responses, tokens, passes, causal_passes, canvases, accepted)


def judged(
    decoded: Decoded,
    teacher: Contestant,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
) -> list[np.ndarray]:
    """Returns the teacher's log-probabilities of the responses, see `response_log_probs`."""
    sampler, params = teacher
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    return response_log_probs(
        sampler.model,
        params,
        prompts,
        decoded.tokens,
        batch_size=config.batch_size,
        multiple=config.prompt_multiple,
    )


def run_batch(
    sampler: Sampler,
    params: Params,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    keys: jax.Array,
) -> SamplerOutput:
    """Returns the sampler's output for a batch, gathered to the host."""
    tokens, lengths = padded(tokenizer, examples, config)
    output: SamplerOutput = processes.on_host(sampler(params, tokens, lengths, rng=keys))
    return output


def padded(
    tokenizer: Tokenizer, examples: Examples, config: EvalConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the padded prompts of examples [B, P] and their lengths [B], both int32."""
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    return pad_prompts(prompts, tokenizer.pad_id, multiple=config.prompt_multiple)
