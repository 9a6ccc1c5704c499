"""Tests the metrics of responses on small cases that are computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from new_params import new_params

from diffusiongemma.evaluation import metrics
from diffusiongemma.evaluation.scoring import response_log_probs
from diffusiongemma.models import Gemma


def log(*probabilities):
    return np.log(np.array(probabilities, np.float32))


def test_a_response_matches_when_every_token_does():
    responses = [[5, 6, 1], [5, 6, 7, 1], [5, 6]]
    references = [[5, 6, 1], [5, 7, 7, 1], [5, 6, 1]]
    assert metrics.exact_match(responses, references) == pytest.approx(1 / 3)
    assert metrics.common_prefix(responses, references) == pytest.approx((3 + 1 + 2) / 3)


def test_the_likelihood_is_per_token_and_not_per_response():
    log_probs = [log(0.5), log(0.25, 0.25, 0.25)]
    expected = -(math.log(0.5) + 3 * math.log(0.25)) / 4
    assert metrics.negative_log_likelihood(log_probs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('responses', 'entropy'),
    [
        ([[3, 3, 3, 3]], 0.0),
        ([[1, 2, 3, 4]], math.log(4)),
        ([[7, 7, 8, 8]], math.log(2)),
        ([[3, 3], [1, 2]], math.log(2) / 2),  # per response, then the mean
    ],
)
def test_token_entropy_is_that_of_the_tokens_of_one_response(responses, entropy):
    assert metrics.token_entropy(responses) == pytest.approx(entropy)


@pytest.mark.parametrize(
    ('responses', 'n', 'share'),
    [
        ([[1, 2, 3, 4]], 2, 0.0),
        ([[1, 2, 1, 2, 1]], 2, 0.5),  # 12 21 12 21
        ([[1, 2, 1, 2, 1]], 3, 1 / 3),  # 121 212 121
        ([[4, 4, 4, 4, 4]], 4, 0.5),
        ([[1, 2]], 3, 0.0),  # no 3-gram
        ([[1, 1, 1], [1, 2, 3]], 2, 0.25),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_came_before(responses, n, share):
    assert metrics.repetition(responses, n) == pytest.approx(share)


def test_implausible_pairs_are_counted_within_canvases_and_across_their_borders():
    # Canvas 2: pairs (0, 1) and (2, 3) lie within one, (1, 2) across; token 0 has no pair.
    log_probs = [log(0.001, 0.5, 0.001, 0.001), log(0.9, 0.9, 0.9)]
    within, across = metrics.implausible_pairs(log_probs, canvas_length=2)
    assert (within, across) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert metrics.implausible_pairs(log_probs, 2, threshold=0.95) == (1.0, 1.0)


def test_there_is_no_share_of_pairs_that_do_not_exist():
    assert metrics.implausible_pairs([log(0.5, 0.5)], canvas_length=8) == (0.0, None)
    assert metrics.implausible_pairs([log(0.5)], canvas_length=8) == (None, None)


def test_the_frontier_leaves_out_what_another_point_reaches_in_both_ways():
    points = [(1.0, 90.0), (2.0, 80.0), (2.0, 85.0), (1.5, 70.0), (4.0, 60.0), (2.0, 85.0)]
    assert metrics.frontier(points) == [(1.0, 90.0), (2.0, 85.0), (4.0, 60.0)]


def test_aup_of_one_token_per_pass_is_the_accuracy():
    assert metrics.accuracy_under_parallelism([(1.0, 80.0)], best=90) == pytest.approx(80)


def test_aup_without_loss_of_accuracy_is_the_plain_area():
    points = [(4.0, 80.0), (1.0, 80.0), (2.0, 80.0)]
    assert metrics.accuracy_under_parallelism(points, best=80) == pytest.approx(4 * 80)


def test_aup_weighs_points_down_that_fall_below_the_best():
    points = [(1.0, 80.0), (3.0, 76.0), (9.0, 74.0)]  # the last one is too low to be included
    heights = 80.0, 76 * math.exp(-3 * (1 - 76 / 80))
    expected = 80 + 2 * sum(heights) / 2
    assert metrics.accuracy_under_parallelism(points, best=80) == pytest.approx(expected)
    assert metrics.accuracy_under_parallelism(points, best=100) < expected


def test_aup_of_a_task_that_nobody_solves_is_0():
    assert metrics.accuracy_under_parallelism([(1.0, 0.0), (2.0, 0.0)], best=0) == 0


STEPS = st.floats(0.1, 10)


@given(st.lists(st.tuples(STEPS, st.floats(0, 5)), min_size=2, max_size=6), STEPS)
def test_aup_grows_with_speed_and_with_the_accuracy_behind_the_slowest_point(rows, more):
    parallelism = np.cumsum([step for step, _ in rows])
    accuracy = np.array([90.0] + [90 - drop for _, drop in rows[1:]])

    def aup(parallelism, accuracy):
        points = list(zip(parallelism.tolist(), accuracy.tolist(), strict=True))
        return metrics.accuracy_under_parallelism(points, best=95)

    before = aup(parallelism, accuracy)
    assert aup(2 * parallelism, accuracy) == pytest.approx(2 * before)
    last = np.arange(len(rows)) == len(rows) - 1
    assert aup(parallelism + more * last, accuracy) > before
    assert aup(parallelism, accuracy + last) > before


@pytest.mark.slow
def test_the_teachers_log_probabilities_are_those_of_its_causal_pass(tiny_config):
    model = Gemma(tiny_config.autoregressive)
    params = new_params(model)
    prompts, responses = [[2, 5, 6], [2, 7], [2, 8, 9, 4]], [[11, 12, 1], [13, 14, 15, 1], [16]]
    found = response_log_probs(model, params, prompts, responses, batch_size=2, multiple=8)
    assert [len(row) for row in found] == [3, 4, 1]
    for prompt, response, row in zip(prompts, responses, found, strict=True):
        assert row.dtype == np.float32
        tokens = jnp.array([prompt + response])
        ones = jnp.ones_like(tokens)
        variables = {'params': params}
        hidden, _ = model.apply(
            variables, tokens, jnp.arange(tokens.size)[None], ones, method='encode'
        )
        logits = model.apply(variables, hidden, method='unembed')
        expected = jax.nn.log_softmax(logits, axis=-1)[0]
        index = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        np.testing.assert_allclose(row, expected[index, jnp.array(response)], atol=1e-5)
