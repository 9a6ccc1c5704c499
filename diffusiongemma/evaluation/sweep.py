"""Evaluates quality and speed of the student at every point of a grid of sampling settings."""

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
from diffusiongemma.sampling import EntropyBound, Sampler, SamplingConfig
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.rules import read_rule

NEAR = 0.01  # a point within this accuracy difference counts as good as the teacher


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of settings of the diffusion mode, whose combinations are all evaluated.

    Attributes:
      entropy_bound: values of `SamplingConfig.entropy_bound`; () keeps that of the sampler, unless
        there are acceptance rules.
      acceptance: other acceptance rules, or their texts, such as 'TopK(k=4)'.
      max_denoising_steps: values of `SamplingConfig.max_denoising_steps`; () keeps that of the
        sampler.
      canvas_length: numbers of tokens per canvas, which may differ from the one in training; ()
        keeps that of the model.
    """

    entropy_bound: tuple[float, ...] = ()
    max_denoising_steps: tuple[int, ...] = ()
    canvas_length: tuple[int, ...] = ()
    acceptance: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        rules = tuple(read_rule('acceptance', rule) for rule in self.acceptance)
        object.__setattr__(self, 'acceptance', rules)
        if not any(vars(self).values()):
            raise ValueError(
                'config.eval.sweep is empty; list values of at least one of '
                f'{[field.name for field in dataclasses.fields(self)]}.'
            )

    def over(self, student: Contestant) -> list[Contestant]:
        """Returns the student with each combination, canvas lengths outermost, steps innermost.

        Raises:
          ValueError: if a value is invalid for sampling, or the grid has only entropy bounds but
            the sampler uses another acceptance rule.
        """
        sampler, params = student
        config = sampler.config
        model: Any = sampler.model  # a flax module: its protocol has no `clone`
        combinations = itertools.product(
            self.canvas_length or (traits(model).canvas_length,),
            self._rules(config),
            self.max_denoising_steps or (config.max_denoising_steps,),
        )
        return [
            (
                dataclasses.replace(
                    sampler,
                    model=model.clone(config=model.config.replace(canvas_length=length)),
                    config=dataclasses.replace(config, max_denoising_steps=steps, **rule),
                ),
                params,
            )
            for length, rule, steps in combinations
        ]

    def _rules(self, config: SamplingConfig) -> list[dict[str, Any]]:
        """Returns the fields of `SamplingConfig` that select each acceptance rule."""
        rule = config.acceptance
        if self.acceptance or isinstance(rule, EntropyBound):
            rule = None  # the grid replaces it
        if self.entropy_bound and rule is not None:
            raise ValueError(
                f'config.eval.sweep.entropy_bound={self.entropy_bound[0]} has no effect beside '
                f'config.sampling.acceptance={rule}; name the rule in config.eval.sweep.acceptance '
                'instead.'
            )
        bounds = [{'entropy_bound': bound, 'acceptance': None} for bound in self.entropy_bound]
        others = [{'entropy_bound': None, 'acceptance': other} for other in self.acceptance]
        return bounds + others or [{}]


@dataclasses.dataclass(frozen=True)
class Point:
    """The result for one contestant, which is a row of sweep.csv.

    Attributes:
      mode: 'autoregressive' (the teacher), 'lossless' or 'diffusion' (the student).
      entropy_bound, max_denoising_steps, canvas_length: the sampling settings; None if the mode
        or its acceptance rule does not use them.
      accuracy: the share of problems that are solved.
      exact_match: the share of responses that equal the teacher's.
      teacher_nll: the negative log-likelihood of the responses under the teacher, in nats per
        token.
      tokens_per_denoise_pass: tokens per denoise pass; 1 in autoregressive mode.
      tokens_per_pass: tokens per pass, where denoise, commit and verify passes are counted; 1 in
        autoregressive mode.
      steps_per_canvas: denoise passes per canvas; None in autoregressive mode.
      tokens_per_second: the speed at the main batch size.
      speedup: the ratio of its tokens/s to the teacher's, as a median over turns.
      acceptance: the text of an acceptance rule that is not an entropy bound, else None.
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
    acceptance: str | None = None

    @property
    def rule(self) -> str:
        """Returns the acceptance rule for a legend."""
        return self.acceptance or f'entropy bound {self.entropy_bound:g}'


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

    Every contestant answers all examples. Then all are timed in turns at the main batch size, so
    that other load on the machine affects them equally. Each point compiles at least two programs.

    Args:
      teacher: an autoregressive sampler and its parameters.
      student: a diffusion sampler and its parameters.
      tokenizer: the tokenizer of both models.
      examples: held-out problems.
      config: the numbers of examples and the batch sizes.
      grid: the grid of settings.
      rng: the PRNG key for the student's noise, which is the same at every point.
      console: the console that shows progress.

    Returns:
      The teacher, the lossless mode, and then the points of the grid in its order.

    Raises:
      ValueError: if a value of the grid is invalid for sampling, or the student is a light one.
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
    is_swept, rule = sampler.mode == 'diffusion', sampler.config.acceptance_rule
    bound = rule.entropy_bound if isinstance(rule, EntropyBound) else None
    return Point(
        mode=sampler.mode,
        entropy_bound=bound if is_swept else None,
        max_denoising_steps=sampler.config.max_denoising_steps if is_swept else None,
        canvas_length=traits(sampler.model).canvas_length or None,  # 0 means no canvas
        accuracy=accuracy(examples, answers.responses),
        exact_match=exact_match(answers.tokens, by_teacher.tokens),
        teacher_nll=teacher_nll,
        tokens_per_denoise_pass=answers.tokens_per_denoise_pass,
        tokens_per_pass=answers.tokens_per_pass,
        steps_per_canvas=answers.steps_per_canvas if answers.canvases else None,
        tokens_per_second=speed.tokens_per_second,
        speedup=speed.ratio,
        acceptance=str(rule) if is_swept and bound is None else None,
    )


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """Returns a summary of a sweep.

    Returns:
      `best`: the fastest diffusion point (by tokens/s) within one percentage point of the
      teacher's accuracy, as a dict, or None. `aup`: `accuracy_under_parallelism` of the Pareto
      frontier of all diffusion points. `teacher_accuracy`, `lossless_accuracy`,
      `lossless_speedup`, and `num_points`, the number of grid points.
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
    """Writes a CSV file with one row per point and the fields of `Point`; None becomes empty."""
    names = [field.name for field in dataclasses.fields(Point)]
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, points))
