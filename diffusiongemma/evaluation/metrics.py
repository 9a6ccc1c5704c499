"""Measures of sampled responses: on token ids, and on the teacher's log-probabilities of them.

A response is a list of token ids, its stop token included. Log-probabilities come from
`scoring.response_log_probs`. Every function reads what it is given and nothing else.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Responses = Sequence[Sequence[int]]

IMPLAUSIBLE = 0.01  # a token that the teacher gives less probability is out of place


@dataclasses.dataclass(frozen=True)
class SampleMeasures:
    """How the responses of one contestant read, to the teacher and by themselves.

    Attributes:
      exact_match: share of them that equal the teacher's greedy ones token for token.
      common_prefix: tokens before the first difference from those, mean over the responses.
      teacher_nll: negative log-likelihood under the teacher, nats per token.
      token_entropy: nats, see `token_entropy`.
      repetition_2, repetition_3, repetition_4: share of repeated n-grams, see `repetition`.
      implausible_within: share of adjacent pairs inside a canvas that the teacher finds out of
        place, see `implausible_pairs`; None without such a pair.
      implausible_across: the same of the pairs on both sides of a border between canvases.
    """

    exact_match: float
    common_prefix: float
    teacher_nll: float
    token_entropy: float
    repetition_2: float
    repetition_3: float
    repetition_4: float
    implausible_within: float | None
    implausible_across: float | None


def sample_measures(
    responses: Responses,
    references: Responses,
    log_probs: Sequence[np.ndarray],
    canvas_length: int,
) -> SampleMeasures:
    """All measures of a set of responses.

    Args:
      responses: at least one, none of them empty.
      references: the teacher's greedy responses to the same prompts.
      log_probs: the teacher's of each response, [tokens of the response] float32 each.
      canvas_length: C, response tokens kC to kC + C - 1 were denoised together.
    """
    within, across = implausible_pairs(log_probs, canvas_length)
    return SampleMeasures(
        exact_match=exact_match(responses, references),
        common_prefix=common_prefix(responses, references),
        teacher_nll=negative_log_likelihood(log_probs),
        token_entropy=token_entropy(responses),
        repetition_2=repetition(responses, 2),
        repetition_3=repetition(responses, 3),
        repetition_4=repetition(responses, 4),
        implausible_within=within,
        implausible_across=across,
    )


def exact_match(responses: Responses, references: Responses) -> float:
    """Share of the responses that equal their references token for token."""
    pairs = list(zip(responses, references, strict=True))
    return sum(list(ours) == list(theirs) for ours, theirs in pairs) / len(pairs)


def common_prefix(responses: Responses, references: Responses) -> float:
    """Tokens before the first difference from the reference, mean over the responses."""

    def length(ours: Sequence[int], theirs: Sequence[int]) -> int:
        both = min(len(ours), len(theirs))
        return next((i for i in range(both) if ours[i] != theirs[i]), both)

    pairs = list(zip(responses, references, strict=True))
    return sum(length(ours, theirs) for ours, theirs in pairs) / len(pairs)


def negative_log_likelihood(log_probs: Sequence[np.ndarray]) -> float:
    """Nats per token over all tokens of all responses, so that long ones weigh more.

    Its exponential is the generative perplexity of the discrete diffusion literature (SEDD, Lou et
    al. 2023, arXiv:2310.16834), with the teacher as judge and given the prompt. It falls when a
    text repeats itself: read it beside the token entropy.
    """
    return float(-np.mean(np.concatenate(log_probs), dtype=np.float64))


def token_entropy(responses: Responses) -> float:
    """Entropy of the tokens of a response among themselves, in nats, mean over the responses.

    -sum_v p(v) log p(v) with p(v) the share of the response's tokens that are v; log(length)
    when no token occurs twice, 0 when only one token occurs. It uncovers the low perplexities that
    repetition earns (Zheng et al. 2024, arXiv:2409.02908); SDTT (Deschenaux and Gulcehre 2024,
    arXiv:2410.21035) reports it beside the perplexity of its few-step students.
    """

    def entropy(response: Sequence[int]) -> float:
        shares = [n / len(response) for n in collections.Counter(response).values()]
        return sum(-share * math.log(share) for share in shares)

    return sum(map(entropy, responses)) / len(responses)


def repetition(responses: Responses, n: int) -> float:
    """Share of the n-grams of a response that occurred earlier in it, mean over the responses.

    The seq-rep-n of Welleck et al. 2019 (Neural text generation with unlikelihood training,
    arXiv:1908.04319): 1 - distinct n-grams / n-grams. A response shorter than n repeats nothing.
    """

    def share(response: Sequence[int]) -> float:
        ngrams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

    return sum(map(share, responses)) / len(responses)


def implausible_pairs(
    log_probs: Sequence[np.ndarray], canvas_length: int, threshold: float = IMPLAUSIBLE
) -> tuple[float | None, float | None]:
    """Local coherence: how often a token does not follow from the one before it.

    A pair is two adjacent tokens of a response, i - 1 and i >= 1. It is implausible when the
    teacher's probability of token i, given the prompt and the response's tokens before i, is below
    `threshold`. Positions that are drawn independently of each other produce such pairs inside a
    canvas; a denoiser that overlooks its prefix produces them across the border between two.

    Args:
      log_probs: of each response, [tokens of the response] float32.
      canvas_length: C; a pair lies across a border when C divides i.
      threshold: a probability.

    Returns:
      The share of implausible pairs within canvases and across borders, over all responses; None
      where there is no such pair.
    """
    implausible: dict[bool, list[bool]] = {True: [], False: []}
    for row in log_probs:
        for i in range(1, len(row)):
            implausible[i % canvas_length == 0].append(row[i] < math.log(threshold))

    def share(pairs: list[bool]) -> float | None:
        return float(np.mean(pairs)) if pairs else None

    return share(implausible[False]), share(implausible[True])


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other reaches in both coordinates, by increasing first coordinate."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]],
    best: float,
    *,
    max_drop: float = 5.0,
    penalty: float = 3.0,
) -> float:
    """AUP, the weighted area under the curve of accuracy over parallelism.

    With the points (r_i, y_i) by increasing r, without those whose y is below y_1 - max_drop:
    r_1 y_1 + sum_{i >= 2} (r_i - r_{i-1}) (y_i w(y_i) + y_{i-1} w(y_{i-1})) / 2, where
    w(y) = min(exp(-penalty (1 - y / best)), 1). Definition and default numbers: Qian et al. 2026
    (d3LLM: Ultra-Fast Diffusion LLM using Pseudo-Trajectory Distillation, ICML), and their article
    'AUP: when Accuracy Meets Parallelism in Diffusion Language Models' (hao-ai-lab.github.io).
    A decoder of one token per pass with accuracy y has an AUP of y.

    Args:
      points: tokens per forward pass and accuracy in percent, at least one.
      best: the highest accuracy that any method reaches on the task, in percent.
      max_drop: points of accuracy below that of the slowest point that still count.
      penalty: how fast a point loses weight as it falls below `best`.
    """
    points = sorted(points)
    slowest, first = points[0]
    parallelism, accuracy = np.array([p for p in points if p[1] >= first - max_drop]).T
    weights = np.minimum(np.exp(-penalty * (1 - accuracy / best)), 1) if best > 0 else 0.0
    heights = accuracy * weights
    steps = np.diff(parallelism) * (heights[1:] + heights[:-1]) / 2
    return float(slowest * first + np.sum(steps))
