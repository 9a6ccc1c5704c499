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
from diffusiongemma.sampling import PromptLookup, Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.lossless import draft, draft_length, text_noise, verify_draft
from diffusiongemma.sampling.sampler import MODES
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


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How the drafts of the lossless mode fared.

    Attributes:
      accepted_length: tokens emitted per verification, the pending one counted.
      histogram: verifications after which 0, 1, .., K + 1 tokens were emitted.
      by_position: of the draft tokens at each place, the share that was accepted where all before
        them were; None where no draft got so far. A response's end cuts the last draft.
    """

    accepted_length: float
    histogram: tuple[int, ...]
    by_position: tuple[float | None, ...]

    @classmethod
    def of(cls, histogram: np.ndarray) -> 'Acceptance':
        """From the histogram [K + 2] of all rows."""
        emitted = np.arange(len(histogram))
        reached = np.cumsum(histogram[::-1])[::-1]  # verifications with at least n tokens
        shares = [
            float(reached[n + 1] / reached[n]) if reached[n] else None
            for n in range(1, len(histogram) - 1)
        ]
        length = float(histogram @ emitted / max(histogram.sum(), 1))
        return cls(length, tuple(int(n) for n in histogram), tuple(shares))


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Tokens/s on the same prompts in the same process, prefill included.

    Attributes:
      speed_batch_size: rows per batch.
      teacher_tokens_per_second: of AR decoding with a K/V cache.
      student_tokens_per_second: of the student in its main mode.
      speedup: their ratio.
      lossless_tokens_per_second: of the student in lossless mode.
      lossless_speedup: its ratio to the teacher's.
      lookup_tokens_per_second: of the lossless mode with drafts from the text so far.
      lookup_speedup: its ratio to the teacher's.
    """

    speed_batch_size: int
    teacher_tokens_per_second: float
    student_tokens_per_second: float
    speedup: float
    lossless_tokens_per_second: float
    lossless_speedup: float
    lookup_tokens_per_second: float
    lookup_speedup: float


@dataclasses.dataclass(frozen=True)
class Comparison(SampleMeasures, Speeds):
    """What the student gained and what it lost.

    The inherited speeds are those at the main batch size, the inherited measures those of the
    student's responses in its main mode. Lookup is the baseline that a learned draft has to beat:
    the lossless mode with drafts that need no training (`sampling.PromptLookup`).

    Attributes:
      mode: the student's main mode: 'diffusion', or 'lossless' of a light student.
      teacher_accuracy: share of the problems that greedy AR decoding of the teacher solves.
      student_accuracy: the same of the student in its main mode.
      tokens_per_denoise_pass: tokens that it emits per denoise pass.
      tokens_per_pass: tokens per pass, commits and verifications counted.
      denoising_steps_per_canvas: denoise passes per canvas.
      lossless_accuracy: of the student in lossless mode.
      lossless_exact_match: share of its responses that equal the teacher's token for token.
      lossless_tokens_per_denoise_pass, lossless_tokens_per_pass: as above, of that mode.
      lossless_draft_share: share of its time that drafting takes, the rest is verification; at the
        main batch size.
      acceptance: how its drafts fared.
      lookup_tokens_per_pass: of the baseline.
      lookup_acceptance: how its drafts fared.
      teacher_samples: the measures of the teacher's own greedy responses, for reference.
      larger_batches: the speeds at the other batch sizes.
      num_examples: problems behind the accuracies and the measures.
    """

    mode: str
    teacher_accuracy: float
    student_accuracy: float
    tokens_per_denoise_pass: float
    tokens_per_pass: float
    denoising_steps_per_canvas: float
    lossless_accuracy: float
    lossless_exact_match: float
    lossless_tokens_per_denoise_pass: float
    lossless_tokens_per_pass: float
    lossless_draft_share: float
    acceptance: Acceptance
    lookup_tokens_per_pass: float
    lookup_acceptance: Acceptance
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
        output = _run(sampler, params, tokenizer, chunk, config, keys[first : first + len(chunk)])
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


def tokens_per_second(
    contestants: Sequence[Contestant],
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    size: int,
    watch: Watch = unwatched,
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
    for batch in watch(batches, f'compiling for batch {size}'):
        for sampler, params in contestants:  # compiles each prompt width once
            jax.block_until_ready(_run(sampler, params, tokenizer, batch, config, keys))
    seconds, tokens = [0.0] * len(contestants), [0] * len(contestants)
    for batch in watch(batches, f'timing batch {size}'):
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
    watch: Watch = unwatched,
) -> tuple[Comparison, list[str], list[str]]:
    """Evaluates both on the same examples.

    Args:
      teacher: autoregressive sampler and its parameters.
      student: sampler in its main mode, and its parameters.
      tokenizer: of both.
      examples: held-out problems.
      config: sizes.
      rng: for the student's noise.
      watch: shows the progress.

    Returns:
      The numbers, the teacher's responses and the student's in its main mode.
    """
    lossless = dataclasses.replace(student[0], mode='lossless'), student[1]
    contestants = {
        'teacher': teacher,
        'student': student,
        'lossless': lossless,
        'lookup': (looking_up(lossless[0]), student[1]),
    }
    if student[0].mode == 'lossless':
        del contestants['student']
    answers = {
        name: decode(*contestant, tokenizer, examples, config, rng, watch, f'{name} answers')
        for name, contestant in contestants.items()
    }
    answers.setdefault('student', answers['lossless'])
    by_teacher, by_student, by_lossless = (
        answers[name] for name in ('teacher', 'student', 'lossless')
    )
    canvas_length = student[0].model.config.canvas_length
    teacher_samples, student_samples = (
        sample_measures(
            decoded.tokens,
            by_teacher.tokens,
            judged(decoded, teacher, tokenizer, examples, config),
            canvas_length,
        )
        for decoded in watch((by_teacher, by_student), 'judging')
    )
    speeds, *larger_batches = (
        _speeds(
            size,
            list(contestants),
            tokens_per_second(
                list(contestants.values()), tokenizer, examples, config, rng, size, watch
            ),
        )
        for size in config.speed_batch_sizes
    )
    comparison = Comparison(
        **dataclasses.asdict(speeds),
        **dataclasses.asdict(student_samples),
        mode=student[0].mode,
        teacher_accuracy=accuracy(examples, by_teacher.responses),
        student_accuracy=accuracy(examples, by_student.responses),
        tokens_per_denoise_pass=by_student.tokens_per_denoise_pass,
        tokens_per_pass=by_student.tokens_per_pass,
        denoising_steps_per_canvas=by_student.steps_per_canvas,
        lossless_accuracy=accuracy(examples, by_lossless.responses),
        lossless_exact_match=exact_match(by_lossless.tokens, by_teacher.tokens),
        lossless_tokens_per_denoise_pass=by_lossless.tokens_per_denoise_pass,
        lossless_tokens_per_pass=by_lossless.tokens_per_pass,
        lossless_draft_share=draft_share(lossless, tokenizer, examples, config, rng),
        acceptance=Acceptance.of(by_lossless.accepted_lengths),
        lookup_tokens_per_pass=answers['lookup'].tokens_per_pass,
        lookup_acceptance=Acceptance.of(answers['lookup'].accepted_lengths),
        teacher_samples=teacher_samples,
        larger_batches=tuple(larger_batches),
        num_examples=len(examples),
    )
    return comparison, by_teacher.responses, by_student.responses


def looking_up(lossless: Sampler) -> Sampler:
    """The lossless mode with drafts from the text so far, as long as the student's own."""
    length = draft_length(lossless.model, lossless.config)
    config = dataclasses.replace(lossless.config, drafts=PromptLookup(length), lookup_ngram=0)
    return dataclasses.replace(lossless, config=config)


def draft_share(
    lossless: Contestant,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    repetitions: int = 20,
) -> float:
    """Share of the lossless mode's time that drafting takes, from medians of interleaved turns.

    It is measured on the first drafts of a batch of the main size, without prefill.
    """
    (sampler, params), size = lossless, config.speed_batch_sizes[0]
    batch = [examples[row % len(examples)] for row in range(size)]
    tokens, lengths = _padded(tokenizer, batch, config)
    arguments = sampler.checked(tokens, lengths, jax.random.split(rng, size), None)
    drafts = jax.jit(draft, static_argnums=(0, 1))
    verifies = jax.jit(verify_draft, static_argnums=(0, 1))
    model, settings = sampler.model, sampler.config
    state = MODES['lossless'].start(model, settings, params, *arguments)
    noise = text_noise(model, settings, state)
    seconds: list[tuple[float, float]] = []
    for _ in range(repetitions + 1):  # the first one compiles
        start = time.perf_counter()
        drafted = jax.block_until_ready(drafts(model, settings, params, state, noise))
        middle = time.perf_counter()
        jax.block_until_ready(verifies(model, settings, params, state, drafted, noise))
        seconds.append((middle - start, time.perf_counter() - middle))
    drafting, verifying = np.median(seconds[1:], axis=0)
    return float(drafting / (drafting + verifying))


def _speeds(size: int, names: Sequence[str], tokens_per_second: Sequence[float]) -> Speeds:
    """Of all contestants at one batch size."""
    speed = dict(zip(names, tokens_per_second, strict=True))
    speed.setdefault('student', speed['lossless'])
    ratio = {name: value / speed['teacher'] for name, value in speed.items()}
    return Speeds(
        speed_batch_size=size,
        teacher_tokens_per_second=speed['teacher'],
        student_tokens_per_second=speed['student'],
        speedup=ratio['student'],
        lossless_tokens_per_second=speed['lossless'],
        lossless_speedup=ratio['lossless'],
        lookup_tokens_per_second=speed['lookup'],
        lookup_speedup=ratio['lookup'],
    )


def _run(
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    keys: jax.Array,
) -> SamplerOutput:
    tokens, lengths = _padded(tokenizer, examples, config)
    return processes.on_host(sampler(params, tokens, lengths, rng=keys))


def _padded(
    tokenizer: Tokenizer, examples: Examples, config: EvalConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, P] and their lengths [B]."""
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    return pad_prompts(prompts, tokenizer.pad_id, multiple=config.prompt_multiple)
