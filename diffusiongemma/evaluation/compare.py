"""Compares student and teacher on the same problems in the same process."""

import dataclasses

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.decoding import (
    Contestant,
    Decoded,
    EvalConfig,
    Examples,
    Watch,
    decode,
    judged,
    unwatched,
)
from diffusiongemma.evaluation.metrics import SampleMeasures, exact_match, sample_measures
from diffusiongemma.evaluation.tasks import accuracy
from diffusiongemma.evaluation.timing import Speeds, draft_share, speeds_of, timed
from diffusiongemma.sampling import PromptLookup, Sampler
from diffusiongemma.sampling.drafter import draft_length
from diffusiongemma.sampling.interface import traits

__all__ = ['Acceptance', 'Comparison', 'Contestant', 'EvalConfig', 'compare', 'looking_up']


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Statistics of the accepted drafts in the lossless mode.

    Attributes:
      accepted_length: the mean number of tokens emitted per verification, including the bonus
        token.
      histogram: the numbers of verifications that emitted 0, 1, .., K + 1 tokens.
      by_position: for each draft position, the acceptance rate of its token, given that all
        earlier draft tokens were accepted; None if no draft got that far. The end of a response
        truncates its last draft.
    """

    accepted_length: float
    histogram: tuple[int, ...]
    by_position: tuple[float | None, ...]

    @classmethod
    def of(cls, histogram: np.ndarray) -> 'Acceptance':
        """Returns the statistics for the histogram [K + 2], summed over all rows."""
        emitted = np.arange(len(histogram))
        reached = np.cumsum(histogram[::-1])[::-1]  # [K + 2], verifications with at least n tokens
        shares = [
            float(reached[n + 1] / reached[n]) if reached[n] else None
            for n in range(1, len(histogram) - 1)
        ]
        length = float(histogram @ emitted / max(histogram.sum(), 1))
        return cls(length, tuple(int(n) for n in histogram), tuple(shares))


@dataclasses.dataclass(frozen=True)
class Comparison(SampleMeasures, Speeds):
    """A comparison of student and teacher in quality and speed.

    The inherited speeds are those at the main batch size; the inherited measures are those of the
    student's responses in its main mode. Lookup is the baseline for a learned draft: the lossless
    mode with drafts that need no training (`sampling.PromptLookup`).

    Attributes:
      mode: the student's main mode: 'diffusion', or 'lossless' for a light student.
      teacher_accuracy: the share of problems that greedy AR decoding of the teacher solves.
      student_accuracy: the share of problems that the student solves in its main mode.
      tokens_per_denoise_pass: tokens per denoise pass of the student in its main mode.
      tokens_per_pass: its tokens per pass; denoise, commit and verify passes are counted.
      denoising_steps_per_canvas: its denoise passes per canvas.
      lossless_accuracy: the share of problems that the student solves in lossless mode.
      lossless_exact_match: the share of its lossless responses that equal the teacher's token for
        token.
      lossless_tokens_per_denoise_pass, lossless_tokens_per_pass: the same units in lossless mode.
      lossless_draft_share: the share of lossless decoding time that drafting takes, at the main
        batch size; the remaining time is verification.
      acceptance: the statistics of the student's drafts.
      lookup_tokens_per_pass: tokens per pass of the lookup baseline.
      lookup_acceptance: the statistics of the drafts of the lookup baseline.
      teacher_samples: the measures of the teacher's greedy responses, for reference.
      larger_batches: the speeds at the other batch sizes.
      num_examples: the number of problems for accuracies and measures.
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


def _contestants(teacher: Contestant, student: Contestant) -> dict[str, Contestant]:
    """Returns all contestants by name: teacher, student, its lossless mode, and lookup drafts.

    'student' is left out if its main mode is the lossless one.
    """
    sampler, params = student
    lossless = dataclasses.replace(sampler, mode='lossless')
    contestants = {'teacher': teacher, 'student': student, 'lossless': (lossless, params)}
    if sampler.mode == 'lossless':
        del contestants['student']
    return contestants | {'lookup': (looking_up(lossless), params)}


def compare(
    teacher: Contestant,
    student: Contestant,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    watch: Watch = unwatched,
) -> tuple[Comparison, list[str], list[str]]:
    """Evaluates teacher and student on the same examples.

    Args:
      teacher: an autoregressive sampler and its parameters.
      student: a sampler in the student's main mode, and its parameters.
      tokenizer: the tokenizer of both models.
      examples: held-out problems.
      config: the numbers of examples and the batch sizes.
      rng: the PRNG key for the student's noise.
      watch: a function that shows progress.

    Returns:
      The comparison, the teacher's responses, and the student's responses in its main mode.
    """
    contestants = _contestants(teacher, student)
    lossless = contestants['lossless']
    answers = {
        name: decode(*contestant, tokenizer, examples, config, rng, watch, f'{name} answers')
        for name, contestant in contestants.items()
    }
    answers.setdefault('student', answers['lossless'])
    by_teacher, by_student, by_lossless = (
        answers[name] for name in ('teacher', 'student', 'lossless')
    )
    canvas_length = traits(student[0].model).canvas_length
    teacher_samples, student_samples = (
        sample_measures(
            decoded.tokens,
            by_teacher.tokens,
            judged(decoded, teacher, tokenizer, examples, config),
            canvas_length,
        )
        for decoded in watch((by_teacher, by_student), 'judging')
    )
    names, samplers = list(contestants), list(contestants.values())
    speeds, *larger_batches = (
        speeds_of(size, names, timed(samplers, tokenizer, examples, config, rng, size, watch))
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
        acceptance=_acceptance(by_lossless),
        lookup_tokens_per_pass=answers['lookup'].tokens_per_pass,
        lookup_acceptance=_acceptance(answers['lookup']),
        teacher_samples=teacher_samples,
        larger_batches=tuple(larger_batches),
        num_examples=len(examples),
    )
    return comparison, by_teacher.responses, by_student.responses


def _acceptance(decoded: Decoded) -> Acceptance:
    """Returns the statistics of the drafts of answers in lossless mode."""
    assert decoded.accepted_lengths is not None  # the lossless mode always counts them
    return Acceptance.of(decoded.accepted_lengths)


def looking_up(lossless: Sampler) -> Sampler:
    """Returns a lossless sampler with lookup drafts of the same length as the student's."""
    length = draft_length(lossless.model, lossless.config)
    config = dataclasses.replace(
        lossless.config, drafts=PromptLookup(length), lookup_ngram=0, model_draft_length=None
    )
    return dataclasses.replace(lossless, config=config)
