"""Measures of sampled responses, from token ids and from the teacher's log-probabilities.

A response is a list of token ids, including its stop token. `scoring.response_log_probs` computes
the log-probabilities. All functions are pure.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Responses = Sequence[Sequence[int]]

IMPLAUSIBLE = 0.01  # a token with a lower probability under the teacher counts as implausible


@dataclasses.dataclass(frozen=True)
class SampleMeasures:
    """The measures of the responses of one contestant.

    Attributes:
      exact_match: the share of responses that equal the teacher's greedy ones token for token.
      common_prefix: the mean number of tokens before the first difference from those.
      teacher_nll: the negative log-likelihood under the teacher, in nats per token.
      token_entropy: the entropy of the tokens of a response in nats, see `token_entropy`.
      repetition_2, repetition_3, repetition_4: the share of repeated n-grams, see `repetition`.
      implausible_within: the share of adjacent token pairs inside a canvas that are implausible
        under the teacher, see `implausible_pairs`; None without such pairs.
      implausible_across: the same share for pairs across the border between two canvases.
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
    """Returns all measures of a set of responses.

    Args:
      responses: at least one response, none of them empty.
      references: the teacher's greedy responses to the same prompts.
      log_probs: the teacher's log-probabilities of each response, [tokens of the response] float32.
      canvas_length: C; response tokens kC to kC + C - 1 were denoised together.
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
    """Returns the share of responses that equal their references token for token."""
    pairs = list(zip(responses, references, strict=True))
    return sum(list(response) == list(reference) for response, reference in pairs) / len(pairs)


def common_prefix(responses: Responses, references: Responses) -> float:
    """Returns the mean number of tokens before the first difference from the reference."""

    def length(response: Sequence[int], reference: Sequence[int]) -> int:
        shorter = min(len(response), len(reference))
        return next((i for i in range(shorter) if response[i] != reference[i]), shorter)

    pairs = list(zip(responses, references, strict=True))
    return sum(length(response, reference) for response, reference in pairs) / len(pairs)


def negative_log_likelihood(log_probs: Sequence[np.ndarray]) -> float:
    """Returns the mean negative log-likelihood over all tokens of all responses, in nats.

    Its exponential is the generative perplexity of the discrete diffusion literature (SEDD, Lou et
    al. 2023, arXiv:2310.16834), under the teacher and conditioned on the prompt. It is low for
    repetitive text, so compare it together with the token entropy.
    """
    return float(-np.mean(np.concatenate(log_probs), dtype=np.float64))


def token_entropy(responses: Responses) -> float:
    """Returns the entropy of the token frequencies within a response in nats, mean over responses.

    For each response it is -sum_v p(v) log p(v), where p(v) is the share of its tokens that equal
    v: log(length) if no token repeats, 0 if there is only one distinct token. It reveals low
    perplexities that are due to repetition (Zheng et al. 2024, arXiv:2409.02908); SDTT (Deschenaux
    and Gulcehre 2024, arXiv:2410.21035) reports it together with the perplexity.
    """

    def entropy(response: Sequence[int]) -> float:
        shares = [n / len(response) for n in collections.Counter(response).values()]
        return sum(-share * math.log(share) for share in shares)

    return sum(map(entropy, responses)) / len(responses)


def repetition(responses: Responses, n: int) -> float:
    """Returns the share of n-grams that occurred earlier in their response, mean over responses.

    This is seq-rep-n of Welleck et al. 2019 (Neural text generation with unlikelihood training,
    arXiv:1908.04319): 1 - distinct n-grams / n-grams. It is 0 for a response shorter than n.
    """

    def share(response: Sequence[int]) -> float:
        ngrams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

    return sum(map(share, responses)) / len(responses)


def implausible_pairs(
    log_probs: Sequence[np.ndarray], canvas_length: int, threshold: float = IMPLAUSIBLE
) -> tuple[float | None, float | None]:
    """Returns the shares of implausible token pairs within canvases and across their borders.

    This measures local coherence. A pair consists of adjacent tokens of a response, i - 1 and
    i >= 1. It is implausible if the teacher's probability of token i, given the prompt and the
    response tokens before i, is below `threshold`. Positions that are drawn independently produce
    such pairs inside a canvas; a denoiser that ignores its prefix produces them across borders.

    Args:
      log_probs: the log-probabilities of each response, [tokens of the response] float32.
      canvas_length: C; a pair lies across a border if C divides i.
      threshold: the probability below which a token is implausible.

    Returns:
      The share within canvases and the share across borders, over all responses; None if there
      are no such pairs.
    """
    implausible: dict[bool, list[bool]] = {True: [], False: []}
    for row in log_probs:
        for i in range(1, len(row)):
            implausible[i % canvas_length == 0].append(row[i] < math.log(threshold))

    def share(pairs: list[bool]) -> float | None:
        return float(np.mean(pairs)) if pairs else None

    return share(implausible[False]), share(implausible[True])


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the Pareto frontier (larger is better in both), sorted by the first coordinate."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]],
    best: float,
    *,
    max_drop: float = 5.0,
    penalty: float = 3.0,
) -> float:
    """Returns the AUP, the weighted area under the curve of accuracy over parallelism.

    For points (r_i, y_i), sorted by r and without those with y below y_1 - max_drop, it is
    r_1 y_1 + sum_{i >= 2} (r_i - r_{i-1}) (y_i w(y_i) + y_{i-1} w(y_{i-1})) / 2, where
    w(y) = min(exp(-penalty (1 - y / best)), 1). Definition and default values: Qian et al. 2026
    (d3LLM: Ultra-Fast Diffusion LLM using Pseudo-Trajectory Distillation, ICML), and their article
    'AUP: when Accuracy Meets Parallelism in Diffusion Language Models' (hao-ai-lab.github.io).
    A decoder with one token per pass and accuracy y has an AUP of y.

    Args:
      points: pairs of tokens per forward pass and accuracy in percent, at least one.
      best: the highest accuracy of any method on the task, in percent.
      max_drop: points whose accuracy is lower than that of the slowest point by more than this
        are ignored, in percentage points.
      penalty: the rate at which the weight of a point decreases below `best`.
    """
    points = sorted(points)
    slowest, first = points[0]
    parallelism, accuracy = np.array([p for p in points if p[1] >= first - max_drop]).T  # [n]
    weights = np.minimum(np.exp(-penalty * (1 - accuracy / best)), 1) if best > 0 else 0.0
    heights = accuracy * weights
    steps = np.diff(parallelism) * (heights[1:] + heights[:-1]) / 2  # [n - 1]
    return float(slowest * first + np.sum(steps))
