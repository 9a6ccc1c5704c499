"""Quality against speed: the student at every point of a grid of sampling settings."""

import csv
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.decoding import (
    Contestant,
    Decoded,
    EvalConfig,
    Examples,
    decode,
    judged,
)
from diffusiongemma.evaluation.metrics import (
    accuracy_under_parallelism,
    exact_match,
    frontier,
    negative_log_likelihood,
)
from diffusiongemma.evaluation.tasks import accuracy
from diffusiongemma.evaluation.timing import Speed, timed
from diffusiongemma.sampling import EntropyBound, Sampler

NEAR = 0.01  # accuracy that a point may lose and still count as good as the teacher


@dataclasses.dataclass(frozen=True)
class Grid:
    """Settings of the diffusion mode; all their combinations are evaluated.

    Attributes:
      entropy_bound: values of `SamplingConfig.entropy_bound`; () for the sampler's own.
      max_denoising_steps: values of that field of it; () likewise.
      canvas_length: tokens of a canvas, whatever the student was trained with; () likewise.
    """

    entropy_bound: tuple[float, ...] = ()
    max_denoising_steps: tuple[int, ...] = ()
    canvas_length: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not any(dataclasses.astuple(self)):
            raise ValueError(
                'config.eval.sweep is empty; list values of at least one of '
                f'{[field.name for field in dataclasses.fields(self)]}.'
            )

    def over(self, student: Contestant) -> list[Contestant]:
        """The student with each combination, canvas lengths outermost, steps innermost.

        Raises:
          ValueError: a value that cannot be sampled with, or entropy bounds of a sampler that
            accepts by another rule.
        """
        sampler, params = student
        own = sampler.config
        model: Any = sampler.model  # a flax module: its protocol has no `clone`
        if self.entropy_bound and isinstance(own.acceptance, EntropyBound):
            own = dataclasses.replace(own, acceptance=None)  # the grid's bounds take its place
        combinations = itertools.product(
            self.canvas_length or (model.config.canvas_length,),
            self.entropy_bound or (own.entropy_bound,),
            self.max_denoising_steps or (own.max_denoising_steps,),
        )
        return [
            (
                dataclasses.replace(
                    sampler,
                    model=model.clone(config=model.config.replace(canvas_length=length)),
                    config=dataclasses.replace(own, entropy_bound=bound, max_denoising_steps=steps),
                ),
                params,
            )
            for length, bound, steps in combinations
        ]


@dataclasses.dataclass(frozen=True)
class Point:
    """One contestant: a row of sweep.csv.

    Attributes:
      mode: 'autoregressive' (the teacher), 'lossless' or 'diffusion' (the student).
      entropy_bound, max_denoising_steps, canvas_length: how it was sampled; None where the mode
        or its acceptance rule doesn't know the setting.
      accuracy: share of the problems that are solved.
      exact_match: share of the responses that equal the teacher's.
      teacher_nll: nats per token, of the responses under the teacher.
      tokens_per_denoise_pass: tokens per denoise pass; 1 when autoregressive.
      tokens_per_pass: tokens per pass, commits and verifications counted; 1 when autoregressive.
      steps_per_canvas: denoise passes per canvas; None when autoregressive.
      tokens_per_second: at the main batch size.
      speedup: its ratio to the teacher's, the median of turns.
    """

    mode: str
    entropy_bound: float | None
    max_denoising_steps: int | None
    canvas_length: int | None
    accuracy: float
    exact_match: float
    teacher_nll: float
    tokens_per_denoise_pass: float
    tokens_per_pass: float
    steps_per_canvas: float | None
    tokens_per_second: float
    speedup: float


def sweep(
    teacher: Contestant,
    student: Contestant,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    grid: Grid,
    rng: jax.Array,
    console: Console,
) -> list[Point]:
    """Evaluates the teacher, the student's lossless mode and every point of the grid.

    Every contestant answers all examples; then all are timed in turns at the main batch size,
    so that they share what else the machine does. Each point compiles two programs.

    Args:
      teacher: autoregressive sampler and its parameters.
      student: diffusion sampler and its parameters.
      tokenizer: of both.
      examples: held-out problems.
      config: sizes.
      grid: of the settings.
      rng: for the student's noise, the same at every point.
      console: shows the progress.

    Returns:
      The teacher, the lossless mode, then the points of the grid in its order.

    Raises:
      ValueError: a value of the grid cannot be sampled with, or the student is a light one.
    """
    if student[0].mode != 'diffusion':
        raise ValueError(
            'a sweep is over settings of the diffusion mode, and a light student only drafts for '
            'the lossless one; evaluate it without --sweep.'
        )
    lossless = dataclasses.replace(student[0], mode='lossless'), student[1]
    contestants = [teacher, lossless, *grid.over(student)]
    watch = functools.partial(track, console=console)
    decoded = [
        decode(*contestant, tokenizer, examples, config, rng)
        for contestant in watch(contestants, 'answering')
    ]
    speeds = timed(
        contestants, tokenizer, examples, config, rng, config.speed_batch_sizes[0], watch
    )
    likelihoods = [
        negative_log_likelihood(judged(answers, teacher, tokenizer, examples, config))
        for answers in watch(decoded, 'judging')
    ]
    return [
        _point(sampler, examples, answers, decoded[0], likelihood, speed)
        for (sampler, _), answers, likelihood, speed in zip(
            contestants, decoded, likelihoods, speeds, strict=True
        )
    ]


def _point(
    sampler: Sampler,
    examples: Examples,
    answers: Decoded,
    by_teacher: Decoded,
    teacher_nll: float,
    speed: Speed,
) -> Point:
    is_swept = sampler.mode == 'diffusion'
    return Point(
        mode=sampler.mode,
        entropy_bound=_entropy_bound(sampler) if is_swept else None,
        max_denoising_steps=sampler.config.max_denoising_steps if is_swept else None,
        canvas_length=sampler.model.config.canvas_length or None,  # 0: it has no canvas
        accuracy=accuracy(examples, answers.responses),
        exact_match=exact_match(answers.tokens, by_teacher.tokens),
        teacher_nll=teacher_nll,
        tokens_per_denoise_pass=answers.tokens_per_denoise_pass,
        tokens_per_pass=answers.tokens_per_pass,
        steps_per_canvas=answers.steps_per_canvas if answers.canvases else None,
        tokens_per_second=speed.tokens_per_second,
        speedup=speed.ratio,
    )


def _entropy_bound(sampler: Sampler) -> float | None:
    rule = sampler.config.acceptance_rule
    return rule.entropy_bound if isinstance(rule, EntropyBound) else None


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """The sweep in a few numbers.

    Returns:
      `best`: of the diffusion points within one point of the teacher's accuracy the fastest by
      the clock, as a dict; None where there is none. `aup`: of the frontier of all diffusion
      points, see `accuracy_under_parallelism`. `teacher_accuracy`, `lossless_accuracy`,
      `lossless_speedup`, and `num_points`, those of the grid.
    """
    teacher, lossless, *diffusion = points
    near = [point for point in diffusion if point.accuracy >= teacher.accuracy - NEAR - 1e-9]
    best = max(near, key=lambda point: point.speedup, default=None)
    curve = frontier([(point.tokens_per_denoise_pass, 100 * point.accuracy) for point in diffusion])
    highest = max(100 * point.accuracy for point in points)
    return {
        'best': None if best is None else dataclasses.asdict(best),
        'aup': accuracy_under_parallelism(curve, highest),
        'teacher_accuracy': teacher.accuracy,
        'lossless_accuracy': lossless.accuracy,
        'lossless_speedup': lossless.speedup,
        'num_points': len(diffusion),
    }


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """Writes one row for each point, with the names of the fields above; None is empty."""
    names = [field.name for field in dataclasses.fields(Point)]
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, points))
