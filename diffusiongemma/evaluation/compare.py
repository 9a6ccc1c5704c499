"""Student against teacher: the same problems, the same process, one compiled program each."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.tasks import accuracy
from diffusiongemma.sampling import Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.state import SamplerOutput

Examples = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much is evaluated.

    Attributes:
      num_examples: held-out problems for the accuracy.
      batch_size: rows decoded at once for the accuracy.
      speed_batch_size: rows decoded at once for the speed.
      speed_batches: batches timed for the speed.
      prompt_multiple: prompts are padded to a multiple of this.
    """

    num_examples: int = 256
    batch_size: int = 32
    speed_batch_size: int = 1
    speed_batches: int = 24
    prompt_multiple: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f'{field.name} must be >= 1, got {getattr(self, field.name)}.')


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Responses to all examples, and what they cost.

    Attributes:
      responses: text of each.
      tokens: ids of each, the stop token included.
      passes: denoise passes (autoregressive: forward passes), over all examples.
      canvases: canvases, over all examples; 0 when autoregressive.
    """

    responses: list[str]
    tokens: list[list[int]]
    passes: int
    canvases: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the student gained and what it lost, in both of its modes.

    All speeds are of the same process, prompts and batch size, prefill included.

    Attributes:
      teacher_accuracy: share of the problems that greedy AR decoding of the teacher solves.
      student_accuracy: the same of the student in diffusion mode.
      tokens_per_forward: tokens the student emits per denoise pass.
      denoising_steps_per_canvas: denoise passes per canvas.
      teacher_tokens_per_second: of AR decoding with a K/V cache.
      student_tokens_per_second: of the student in diffusion mode.
      speedup: their ratio.
      lossless_accuracy: of the student in lossless mode.
      lossless_exact_match: share of its responses that equal the teacher's token for token.
      lossless_tokens_per_pass: tokens per pass of that mode, drafts and verifications counted.
      lossless_tokens_per_second: of that mode.
      lossless_speedup: its ratio to the teacher's.
      num_examples: problems behind the accuracies.
      speed_batch_size: rows per batch behind the speeds.
    """

    teacher_accuracy: float
    student_accuracy: float
    tokens_per_forward: float
    denoising_steps_per_canvas: float
    teacher_tokens_per_second: float
    student_tokens_per_second: float
    speedup: float
    lossless_accuracy: float
    lossless_exact_match: float
    lossless_tokens_per_pass: float
    lossless_tokens_per_second: float
    lossless_speedup: float
    num_examples: int
    speed_batch_size: int


def decode(
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
) -> Decoded:
    """Answers every example, `config.batch_size` rows at once; each row has its own key."""
    responses, tokens, passes, canvases = [], [], 0, 0
    keys = jax.random.split(rng, len(examples))
    for first in range(0, len(examples), config.batch_size):
        chunk = examples[first : first + config.batch_size]
        output = _run(sampler, params, tokenizer, chunk, config, keys[first : first + len(chunk)])
        responses += decode_responses(tokenizer, output)
        rows, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
        tokens += [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
        passes += int(np.sum(output.denoising_steps))
        canvases += int(np.sum(output.canvases))
    return Decoded(responses, tokens, passes, canvases)


def tokens_per_second(
    samplers: Sequence[tuple[Sampler, Any]],
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
) -> list[float]:
    """Tokens/s of each (sampler, params), timed in turns on the same batches.

    Each program is compiled and run once before it is timed; taking turns spreads whatever
    else the machine does evenly over the samplers.
    """
    size = config.speed_batch_size
    keys = jax.random.split(rng, size)
    batches = [
        [examples[(i * size + row) % len(examples)] for row in range(size)]
        for i in range(config.speed_batches)
    ]
    for batch in batches:
        for sampler, params in samplers:  # compiles each prompt width once
            jax.block_until_ready(_run(sampler, params, tokenizer, batch, config, keys))
    seconds, tokens = [0.0] * len(samplers), [0] * len(samplers)
    for batch in batches:
        for i, (sampler, params) in enumerate(samplers):
            start = time.perf_counter()
            output = jax.block_until_ready(_run(sampler, params, tokenizer, batch, config, keys))
            seconds[i] += time.perf_counter() - start
            tokens[i] += int(np.sum(output.lengths))
    return [count / elapsed for count, elapsed in zip(tokens, seconds, strict=True)]


def compare(
    teacher: tuple[Sampler, Any],
    student: tuple[Sampler, Any],
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
) -> tuple[Comparison, list[str], list[str]]:
    """Evaluates both on the same examples.

    Args:
      teacher: autoregressive sampler and its parameters.
      student: diffusion sampler and its parameters.
      tokenizer: of both.
      examples: held-out problems.
      config: sizes.
      rng: for the student's noise.

    Returns:
      The numbers, the teacher's responses and the student's in diffusion mode.
    """
    lossless = dataclasses.replace(student[0], mode='lossless'), student[1]
    contestants = [teacher, student, lossless]
    by_teacher, by_student, by_lossless = (
        decode(*contestant, tokenizer, examples, config, rng) for contestant in contestants
    )
    speeds = tokens_per_second(contestants, tokenizer, examples, config, rng)
    same = [a == b for a, b in zip(by_teacher.tokens, by_lossless.tokens, strict=True)]
    comparison = Comparison(
        teacher_accuracy=accuracy(examples, by_teacher.responses),
        student_accuracy=accuracy(examples, by_student.responses),
        tokens_per_forward=by_student.num_tokens / max(by_student.passes, 1),
        denoising_steps_per_canvas=by_student.passes / max(by_student.canvases, 1),
        teacher_tokens_per_second=speeds[0],
        student_tokens_per_second=speeds[1],
        speedup=speeds[1] / speeds[0],
        lossless_accuracy=accuracy(examples, by_lossless.responses),
        lossless_exact_match=sum(same) / len(same),
        lossless_tokens_per_pass=by_lossless.num_tokens
        / (by_lossless.passes + by_lossless.canvases),
        lossless_tokens_per_second=speeds[2],
        lossless_speedup=speeds[2] / speeds[0],
        num_examples=len(examples),
        speed_batch_size=config.speed_batch_size,
    )
    return comparison, by_teacher.responses, by_student.responses


def _run(
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    keys: jax.Array,
) -> SamplerOutput:
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    tokens, lengths = pad_prompts(prompts, tokenizer.pad_id, multiple=config.prompt_multiple)
    return sampler(params, tokens, lengths, rng=keys)
