"""Measures the speed of decode modes relative to each other, in turns in one process."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.decoding import (
    Contestant,
    EvalConfig,
    Examples,
    Watch,
    padded,
    run_batch,
    unwatched,
)
from diffusiongemma.sampling.drafter import draft
from diffusiongemma.sampling.lossless import text_noise, verify_draft
from diffusiongemma.sampling.sampler import LOSSLESS

FEWEST_TURNS = 5  # per batch size, unless the config sets fewer for the main one


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of one contestant over all turns.

    Attributes:
      tokens_per_second: the median number of tokens per second.
      ratio: the median ratio of its tokens/s to those of the first contestant in the same turn.
      spread: the 10th and the 90th percentile of that ratio.
    """

    tokens_per_second: float
    ratio: float
    spread: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Speeds:
    """The median speeds on the same prompts in the same process, including prefill.

    Attributes:
      speed_batch_size: the number of rows per batch.
      teacher_tokens_per_second: the speed of the teacher's AR decoding with a K/V cache.
      student_tokens_per_second: the speed of the student in its main mode.
      speedup: its ratio to the teacher's speed, as a median over turns.
      speedup_spread: the 10th and the 90th percentile of the ratio over the turns.
      lossless_tokens_per_second, lossless_speedup, lossless_speedup_spread: the same for the
        student in lossless mode.
      lookup_tokens_per_second, lookup_speedup, lookup_speedup_spread: the same for the lossless
        mode with drafts that are copied from the text so far.
    """

    speed_batch_size: int
    teacher_tokens_per_second: float
    student_tokens_per_second: float
    speedup: float
    speedup_spread: tuple[float, float]
    lossless_tokens_per_second: float
    lossless_speedup: float
    lossless_speedup_spread: tuple[float, float]
    lookup_tokens_per_second: float
    lookup_speedup: float
    lookup_speedup_spread: tuple[float, float]


def timed(
    contestants: Sequence[Contestant],
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    size: int,
    watch: Watch = unwatched,
) -> list[Speed]:
    """Returns the speed of each contestant, timed in turns on the same batches.

    Each program is compiled and run once before it is timed. Turns spread other load on the
    machine evenly over the contestants.

    Args:
      contestants: samplers and their parameters; ratios are relative to the first one.
      tokenizer: the tokenizer of all models.
      examples: prompts, which are repeated from the first one if there are too few.
      config: the number of prompts, see `EvalConfig.speed_batches`.
      rng: the PRNG key for the noise.
      size: the number of rows per batch.
      watch: a function that iterates over batches and shows the progress.
    """
    keys = jax.random.split(rng, size)
    num_prompts = config.speed_batches * config.speed_batch_sizes[0]
    turns = max(-(-num_prompts // size), min(FEWEST_TURNS, config.speed_batches))
    batches = [
        [examples[(turn * size + row) % len(examples)] for row in range(size)]
        for turn in range(turns)
    ]
    for batch in watch(batches, f'compiling for batch {size}'):
        for sampler, params in contestants:  # compiles each prompt width once
            jax.block_until_ready(run_batch(sampler, params, tokenizer, batch, config, keys))
    rates = np.zeros((turns, len(contestants)))  # [turns, contestants] tokens/s
    for turn, batch in enumerate(watch(batches, f'timing batch {size}')):
        for i, (sampler, params) in enumerate(contestants):
            start = time.perf_counter()
            output = run_batch(sampler, params, tokenizer, batch, config, keys)
            rates[turn, i] = np.sum(output.lengths) / (time.perf_counter() - start)
    ratios = rates / rates[:, :1]
    low, middle, high = np.percentile(ratios, (10, 50, 90), axis=0)  # [contestants] each
    return [
        Speed(float(np.median(rates[:, i])), float(middle[i]), (float(low[i]), float(high[i])))
        for i in range(len(contestants))
    ]


def speeds_of(size: int, names: Sequence[str], speeds: Sequence[Speed]) -> Speeds:
    """Returns the speeds of named contestants.

    The names are 'teacher', 'lossless', 'lookup' and, unless the student's main mode is lossless,
    'student'.
    """
    by_name = dict(zip(names, speeds, strict=True))
    teacher, lossless, lookup = (by_name[name] for name in ('teacher', 'lossless', 'lookup'))
    student = by_name.get('student', lossless)
    return Speeds(
        speed_batch_size=size,
        teacher_tokens_per_second=teacher.tokens_per_second,
        student_tokens_per_second=student.tokens_per_second,
        speedup=student.ratio,
        speedup_spread=student.spread,
        lossless_tokens_per_second=lossless.tokens_per_second,
        lossless_speedup=lossless.ratio,
        lossless_speedup_spread=lossless.spread,
        lookup_tokens_per_second=lookup.tokens_per_second,
        lookup_speedup=lookup.ratio,
        lookup_speedup_spread=lookup.spread,
    )


def draft_share(
    lossless: Contestant,
    tokenizer: Tokenizer,
    examples: Examples,
    config: EvalConfig,
    rng: jax.Array,
    repetitions: int = 20,
) -> float:
    """Returns the share of lossless decoding time that drafting takes.

    It is computed from the median times of drafting and of verifying the first drafts of a batch of
    the main size, without prefill.
    """
    (sampler, params), size = lossless, config.speed_batch_sizes[0]
    batch = [examples[row % len(examples)] for row in range(size)]
    tokens, lengths = padded(tokenizer, batch, config)
    arguments = sampler.checked(tokens, lengths, jax.random.split(rng, size), None)
    drafts = jax.jit(draft, static_argnums=(0, 1))
    verifies = jax.jit(verify_draft, static_argnums=(0, 1))
    model, settings = sampler.model, sampler.config
    state = LOSSLESS.start(model, settings, params, *arguments)
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
