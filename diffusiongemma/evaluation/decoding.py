"""What is evaluated and how much of it: examples, answers to them and what they cost."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.scoring import response_log_probs
from diffusiongemma.models.arrays import Params
from diffusiongemma.parallel import processes
from diffusiongemma.sampling import Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.state import SamplerOutput

Examples = Sequence[Mapping[str, Any]]
Contestant = tuple[Sampler, Any]  # and its parameters
# Iterates over parts of a task and shows how far it is under a description.
Watch = Callable[[Sequence[Any], str], Iterable[Any]]


def unwatched(parts: Sequence[Any], description: str) -> Iterable[Any]:
    """Shows nothing."""
    del description
    return parts


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much is evaluated.

    Attributes:
      num_examples: held-out problems for the accuracy.
      batch_size: rows decoded at once for the accuracy.
      speed_batch_sizes: rows decoded at once for the speed, the main size first.
      speed_batches: batches of the main size that are timed; of the others as many as hold
        these prompts, and five at least unless this is less.
      prompt_multiple: prompts are padded to a multiple of this.
    """

    num_examples: int = 256
    batch_size: int = 32
    speed_batch_sizes: tuple[int, ...] = (1, 8)
    speed_batches: int = 24
    prompt_multiple: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, 'speed_batch_sizes', tuple(self.speed_batch_sizes))
        if not self.speed_batch_sizes:
            raise ValueError('speed_batch_sizes is empty; (1,) measures one row at a time.')
        for field in dataclasses.fields(EvalConfig):
            value = getattr(self, field.name)
            if min(np.atleast_1d(value)) < 1:
                raise ValueError(f'{field.name} must be >= 1, got {value}.')


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Responses to all examples, and what they cost.

    Attributes:
      responses: text of each.
      tokens: ids of each, the stop token included.
      passes: denoise passes (autoregressive: forward passes), over all examples.
      causal_passes: commits and verifications, over all examples; 0 when autoregressive.
      canvases: canvases, over all examples; 0 when autoregressive.
      accepted_lengths: [K + 2], see `SamplerOutput`, summed; None but in the lossless mode.
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
        """Tokens per denoise pass; 1 when autoregressive."""
        return self.num_tokens / max(self.passes, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass: denoise passes, commits and verifications counted, prefills not."""
        return self.num_tokens / max(self.passes + self.causal_passes, 1)

    @property
    def steps_per_canvas(self) -> float:
        """Denoise passes per canvas."""
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
    """Answers every example, `config.batch_size` rows at once; each row has its own key."""
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
            counts = np.sum(output.accepted_lengths, axis=0)
            accepted = counts if accepted is None else accepted + counts
    return Decoded(responses, tokens, passes, causal_passes, canvases, accepted)


def judged(
    decoded: Decoded,
    teacher: Contestant,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
) -> list[np.ndarray]:
    """The teacher's log-probabilities of the responses, see `response_log_probs`."""
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
    """The sampler's answers to a batch, on the host."""
    tokens, lengths = padded(tokenizer, examples, config)
    return processes.on_host(sampler(params, tokens, lengths, rng=keys))


def padded(
    tokenizer: Tokenizer, examples: Examples, config: EvalConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, P] and their lengths [B]."""
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    return pad_prompts(prompts, tokenizer.pad_id, multiple=config.prompt_multiple)
