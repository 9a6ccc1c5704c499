"""Student against teacher: the same problems, the same process, one compiled program each."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.metrics import SampleMeasures, exact_match, sample_measures
from diffusiongemma.evaluation.scoring import response_log_probs
from diffusiongemma.evaluation.tasks import accuracy
from diffusiongemma.parallel import processes
from diffusiongemma.sampling import Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.state import SamplerOutput

Examples = Sequence[Mapping[str, Any]]
Contestant = tuple[Sampler, Any]  # and its parameters


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much is evaluated.

    Attributes:
      num_examples: held-out problems for the accuracy.
      batch_size: rows decoded at once for the accuracy.
      speed_batch_sizes: rows decoded at once for the speed, the main size first.
      speed_batches: batches of the main size that are timed; of the others as many as hold
        these prompts.
      prompt_multiple: prompts are padded to a multiple of this.
    """

    num_examples: int = 256
    batch_size: int = 32
    speed_batch_sizes: tuple[int, ...] = (1, 8)
    speed_batches: int = 24
    prompt_multiple: int = 64

    def __post_init__(self):
        object.__setattr__(self, 'speed_batch_sizes', tuple(self.speed_batch_sizes))
        if not self.speed_batch_sizes:
            raise ValueError('speed_batch_sizes is empty; (1,) measures one row at a time.')
        for field in dataclasses.fields(self):
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
      canvases: canvases, over all examples; 0 when autoregressive.
    """

    responses: list[str]
    tokens: list[list[int]]
    passes: int
    canvases: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per denoise pass."""
        return self.num_tokens / max(self.passes, 1)

    @property
    def steps_per_canvas(self) -> float:
        """Denoise passes per canvas."""
        return self.passes / max(self.canvases, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass of the lossless mode, drafts and verifications counted."""
        return self.num_tokens / (self.passes + self.canvases)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Tokens/s on the same prompts in the same process, prefill included.

    Attributes:
      speed_batch_size: rows per batch.
      teacher_tokens_per_second: of AR decoding with a K/V cache.
      student_tokens_per_second: of the student in diffusion mode.
      speedup: their ratio.
      lossless_tokens_per_second: of the student in lossless mode.
      lossless_speedup: its ratio to the teacher's.
    """

    speed_batch_size: int
    teacher_tokens_per_second: float
    student_tokens_per_second: float
    speedup: float
    lossless_tokens_per_second: float
    lossless_speedup: float


@dataclasses.dataclass(frozen=True)
class Comparison(SampleMeasures, Speeds):
    """What the student gained and what it lost, in both of its modes.

    The inherited speeds are those at the main batch size, the inherited measures those of the
    student's responses in diffusion mode.

    Attributes:
      teacher_accuracy: share of the problems that greedy AR decoding of the teacher solves.
      student_accuracy: the same of the student in diffusion mode.
      tokens_per_forward: tokens the student emits per denoise pass.
      denoising_steps_per_canvas: denoise passes per canvas.
      lossless_accuracy: of the student in lossless mode.
      lossless_exact_match: share of its responses that equal the teacher's token for token.
      lossless_tokens_per_pass: tokens per pass of that mode, drafts and verifications counted.
      teacher_samples: the measures of the teacher's own greedy responses, for reference.
      larger_batches: the speeds at the other batch sizes.
      num_examples: problems behind the accuracies and the measures.
    """

    teacher_accuracy: float
    student_accuracy: float
    tokens_per_forward: float
    denoising_steps_per_canvas: float
    lossless_accuracy: float
    lossless_exact_match: float
    lossless_tokens_per_pass: float
    teacher_samples: SampleMeasures
    larger_batches: tuple[Speeds, ...]
    num_examples: int


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


def tokens_per_second(
    contestants: Sequence[Contestant],
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    size: int,
    watch: Callable[[Sequence[Examples], str], Iterable[Examples]] = lambda batches, _: batches,
) -> list[float]:
    """Tokens/s of each contestant, timed in turns on the same batches.

    Each program is compiled and run once before it is timed; taking turns spreads whatever
    else the machine does evenly over the contestants.

    Args:
      contestants: samplers and their parameters.
      tokenizer: of all of them.
      examples: prompts, used again from the first one where there are too few.
      config: how many prompts, see `EvalConfig.speed_batches`.
      rng: for the noise.
      size: rows per batch.
      watch: iterates over batches and shows how far it is under a description.
    """
    keys = jax.random.split(rng, size)
    num_prompts = config.speed_batches * config.speed_batch_sizes[0]
    batches = [
        [examples[(first + row) % len(examples)] for row in range(size)]
        for first in range(0, num_prompts, size)
    ]
    for batch in watch(batches, 'compiling'):
        for sampler, params in contestants:  # compiles each prompt width once
            jax.block_until_ready(_run(sampler, params, tokenizer, batch, config, keys))
    seconds, tokens = [0.0] * len(contestants), [0] * len(contestants)
    for batch in watch(batches, 'timing'):
        for i, (sampler, params) in enumerate(contestants):
            start = time.perf_counter()
            output = jax.block_until_ready(_run(sampler, params, tokenizer, batch, config, keys))
            seconds[i] += time.perf_counter() - start
            tokens[i] += int(np.sum(output.lengths))
    return [count / elapsed for count, elapsed in zip(tokens, seconds, strict=True)]


def compare(
    teacher: Contestant,
    student: Contestant,
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
    canvas_length = student[0].model.config.canvas_length
    teacher_samples, student_samples = (
        sample_measures(
            decoded.tokens,
            by_teacher.tokens,
            judged(decoded, teacher, tokenizer, examples, config),
            canvas_length,
        )
        for decoded in (by_teacher, by_student)
    )
    speeds, *larger_batches = (
        _speeds(size, tokens_per_second(contestants, tokenizer, examples, config, rng, size))
        for size in config.speed_batch_sizes
    )
    comparison = Comparison(
        **dataclasses.asdict(speeds),
        **dataclasses.asdict(student_samples),
        teacher_accuracy=accuracy(examples, by_teacher.responses),
        student_accuracy=accuracy(examples, by_student.responses),
        tokens_per_forward=by_student.tokens_per_forward,
        denoising_steps_per_canvas=by_student.steps_per_canvas,
        lossless_accuracy=accuracy(examples, by_lossless.responses),
        lossless_exact_match=exact_match(by_lossless.tokens, by_teacher.tokens),
        lossless_tokens_per_pass=by_lossless.tokens_per_pass,
        teacher_samples=teacher_samples,
        larger_batches=tuple(larger_batches),
        num_examples=len(examples),
    )
    return comparison, by_teacher.responses, by_student.responses


def _speeds(size: int, tokens_per_second: Sequence[float]) -> Speeds:
    """Of the teacher, the student and its lossless mode at one batch size."""
    teacher, student, lossless = tokens_per_second
    return Speeds(size, teacher, student, student / teacher, lossless, lossless / teacher)


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
    return processes.on_host(sampler(params, tokens, lengths, rng=keys))
