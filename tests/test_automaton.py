"""Tests the posterior of a canvas under an automaton against an enumeration of all canvases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiongemma.constraints import automaton as fa
from diffusiongemma.constraints.automaton import DEAD, END, FREE, START, UNREACHABLE, TokenAutomaton
from diffusiongemma.constraints.posterior import condition
from diffusiongemma.sampling.epilogue import draw_tokens
from diffusiongemma.sampling.randomness import row_keys

V, N, K, C = 5, 7, 4, 4
CANVASES = np.array(list(itertools.product(range(V), repeat=C)))


def random_automaton(rng):
    """Returns random transitions; the last class is the stop token, which leads to END or DEAD."""
    classes = rng.integers(0, K, V)
    next_states = rng.choice([DEAD, *range(START, N)], (N, K))
    next_states[:, -1] = rng.choice([DEAD, END], N)
    next_states[:START] = np.arange(START)[:, None]
    return TokenAutomaton.create(classes, next_states, multiple=4)


def random_logits(rng, rows, banned=0.1):
    logits = rng.normal(0, 3, (rows, C, V)).astype(np.float32)
    return np.where(rng.random(logits.shape) < banned, -np.inf, logits)


def valid_canvases(automaton, state, remaining):
    """Returns [V^C] bool, computed from the definition, one token after the other."""
    classes, next_states, distances = (np.asarray(x) for x in jax.tree.leaves(automaton))
    path = [np.full(len(CANVASES), state)]
    for tokens in CANVASES.T:
        path.append(next_states[path[-1], classes[tokens]])
    in_canvas = min(remaining, C)
    return distances[path[max(in_canvas, 0)]] <= remaining - in_canvas


def enumerated(automaton, logits, state, remaining):
    """Returns log-weights [V^C] of all canvases, -inf for invalid ones."""
    weights = logits[np.arange(C), CANVASES].astype(np.float64).sum(axis=1)
    return np.where(valid_canvases(automaton, state, remaining), weights, -np.inf)


@functools.cache
def compiled(name):
    def read(automaton, logits, states, remaining, *keys):
        posterior = condition(automaton, logits, states, remaining)
        return getattr(posterior, name)(*keys), posterior.feasible

    return jax.jit(read)


def read(name, automaton, logits, states, remaining, *keys):
    arrays = (jnp.asarray(logits), jnp.asarray(states), jnp.asarray(remaining))
    return jax.tree.map(np.asarray, compiled(name)(automaton, *arrays, *keys))


def score(logits, canvas):
    return logits[np.arange(C), canvas].astype(np.float64).sum()


seeds = st.integers(0, 2**32 - 1)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_marginals_are_those_of_all_valid_canvases(seed):
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng)
    states, remaining = rng.integers(0, N, 8), rng.integers(0, C + 4, 8)
    logits = random_logits(rng, 8)
    log_marginals, feasible = read('log_marginals', automaton, logits, states, remaining)
    assert not np.isnan(log_marginals).any()
    for row in range(8):
        weights = enumerated(automaton, logits[row], states[row], remaining[row])
        assert feasible[row] == (weights.max() > -np.inf)
        if not feasible[row]:  # as if it were unconstrained
            weights = enumerated(automaton, logits[row], FREE, remaining[row])
        if weights.max() == -np.inf:  # a position at which every token is banned
            continue
        weights = np.exp(weights - weights.max())
        for position in range(C):
            expected = np.bincount(CANVASES[:, position], weights, V) / weights.sum()
            got = np.exp(log_marginals[row, position])
            np.testing.assert_allclose(got, expected, atol=1e-5)
            np.testing.assert_array_equal(log_marginals[row, position] > -np.inf, expected > 0)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_the_most_likely_canvas_is_the_best_of_all_valid_ones(seed):
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng)
    states, remaining = rng.integers(0, N, 8), rng.integers(0, C + 4, 8)
    logits = random_logits(rng, 8)
    canvases, feasible = read('most_likely', automaton, logits, states, remaining)
    for row in np.flatnonzero(feasible):
        weights = enumerated(automaton, logits[row], states[row], remaining[row])
        assert score(logits[row], canvases[row]) == pytest.approx(weights.max(), abs=1e-4)
        assert valid_canvases(automaton, states[row], remaining[row])[
            np.ravel_multi_index(canvases[row], (V,) * C)
        ]


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_every_draw_is_valid_whatever_the_ties(seed):
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng)
    states, remaining = rng.integers(0, N, 8), rng.integers(0, C + 4, 8)
    logits = np.where(random_logits(rng, 8) == -np.inf, -np.inf, 0.0).astype(np.float32)
    keys = row_keys(jax.random.key(seed), 8)
    drawn, feasible = read('draw', automaton, logits, states, remaining, keys)
    best, _ = read('most_likely', automaton, logits, states, remaining)
    for row in np.flatnonzero(feasible):
        weights = enumerated(automaton, logits[row], states[row], remaining[row])
        for canvas in (drawn[row], best[row]):
            assert weights[np.ravel_multi_index(canvas, (V,) * C)] > -np.inf


@pytest.mark.parametrize('seed', [0, 1, 2, 3])
def test_draws_have_the_joint_distribution_of_the_posterior(seed):
    draws = 20_000
    rng = np.random.default_rng(seed)
    while True:
        automaton, logits = random_automaton(rng), random_logits(rng, 1) / 3
        remaining = int(rng.integers(2, C + 3))
        weights = enumerated(automaton, logits[0], START, remaining)
        if np.isfinite(weights).sum() > 20:
            break
    many = (np.repeat(logits, draws, 0), np.full(draws, START), np.full(draws, remaining))
    keys = row_keys(jax.random.key(seed), draws)
    canvases, _ = read('draw', automaton, *many, keys)
    expected = np.exp(weights - weights.max())
    expected *= draws / expected.sum()
    counts = np.bincount(np.ravel_multi_index(canvases.T, (V,) * C), minlength=V**C)
    assert not counts[expected == 0].any()
    rare = expected < 5  # rare cells are pooled, as the chi-square approximation requires
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    pooled = [x[pooled[1] > 0] for x in pooled]
    assert scipy.stats.chisquare(*pooled).pvalue > 1e-3


def test_a_free_row_is_drawn_as_without_an_automaton():
    rng = np.random.default_rng(0)
    automaton, logits = random_automaton(rng), random_logits(rng, 6).round()
    for state in (FREE, END):
        rows = (logits, np.full(6, state), np.array([0, 1, 3, 4, 9, 2]))
        keys = row_keys(jax.random.key(3), 6)
        drawn, feasible = read('draw', automaton, *rows, keys)
        assert feasible.all()
        np.testing.assert_array_equal(drawn, draw_tokens(jnp.asarray(logits), keys))
        np.testing.assert_array_equal(read('most_likely', automaton, *rows)[0], logits.argmax(-1))
        expected = jax.nn.log_softmax(logits, axis=-1)
        np.testing.assert_allclose(read('log_marginals', automaton, *rows)[0], expected, atol=1e-5)


def chain(length):
    """Returns the automaton of the response 0 1 0 1 ... of `length` tokens and the stop token 2."""
    next_states = np.zeros((START + length + 1, 4), int)
    next_states[:START] = np.arange(START)[:, None]
    for i in range(length):
        next_states[START + i, i % 2] = START + i + 1
    next_states[START + length, 2] = END
    return TokenAutomaton.create(np.array([0, 1, 2, 3, 3]), next_states, multiple=1)


def test_a_response_goes_on_from_canvas_to_canvas():
    automaton = chain(5)
    logits = np.random.default_rng(0).normal(0, 9, (1, C, V)).astype(np.float32)
    states, written = jnp.array([START]), []
    for remaining in (8, 4):
        canvas, feasible = read('most_likely', automaton, logits, states, np.array([remaining]))
        assert feasible.all()
        states = fa.advance(automaton, states, jnp.asarray(canvas), jnp.array([C]))
        written += canvas[0].tolist()
    assert written[:6] == [0, 1, 0, 1, 0, 2]
    assert written[6:] == logits[0, 2:].argmax(-1).tolist()
    assert states.tolist() == [END]


def test_a_row_is_feasible_only_while_its_response_can_end_in_time():
    automaton = chain(5)
    logits = np.zeros((4, C, V), np.float32)
    _, feasible = read('most_likely', automaton, logits, [START] * 4, [5, 6, 7, 0])
    assert feasible.tolist() == [False, True, True, False]
    assert automaton.min_tokens == 6


def test_what_cannot_be_made_valid_is_read_as_unconstrained():
    automaton = chain(2)
    logits = np.random.default_rng(0).normal(0, 3, (4, C, V)).astype(np.float32)
    logits[1, 1, 1] = -np.inf  # the only valid token there
    logits[2, 3] = -np.inf  # no token is allowed
    rows = (logits, [DEAD, START, START, START], [9, 9, 9, 2])
    keys = row_keys(jax.random.key(0), 4)
    drawn, feasible = read('draw', automaton, *rows, keys)
    assert not feasible.any()
    np.testing.assert_array_equal(drawn, draw_tokens(jnp.asarray(logits), keys))
    np.testing.assert_array_equal(read('most_likely', automaton, *rows)[0], logits.argmax(-1))
    assert not np.isnan(read('log_marginals', automaton, *rows)[0]).any()


def test_logits_far_apart_lose_no_valid_canvas():
    automaton = chain(3)
    logits = np.full((1, C, V), 200.0, np.float32)
    logits[:, :, :3] = -200.0
    canvas, feasible = read('most_likely', automaton, logits, [START], [4])
    assert feasible.all() and canvas.tolist() == [[0, 1, 0, 2]]
    log_marginals, _ = read('log_marginals', automaton, logits, [START], [4])
    np.testing.assert_allclose(np.exp(log_marginals[0, range(4), [0, 1, 0, 2]]), 1.0, rtol=1e-5)


def test_automata_of_one_shape_share_a_program():
    traced = []

    @jax.jit
    def run(automaton, logits):
        traced.append(1)
        return condition(automaton, logits, jnp.array([START]), jnp.array([9])).most_likely()

    rng = np.random.default_rng(0)
    for _ in range(3):
        run(random_automaton(rng), jnp.zeros((1, C, V)))
    assert len(traced) == 1


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_allowed_tokens_are_those_that_leave_enough_room(seed):
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng)
    classes, next_states, distances = (np.asarray(x) for x in jax.tree.leaves(automaton))
    states, remaining = rng.integers(0, N, 8), rng.integers(1, 6, 8)
    got = fa.allowed(automaton, jnp.asarray(states), jnp.asarray(remaining))
    after = distances[next_states[states[:, None], classes]]
    np.testing.assert_array_equal(got, after <= remaining[:, None] - 1)


def test_nothing_is_allowed_when_no_token_remains():
    got = fa.allowed(chain(0), jnp.array([START, START, END, FREE]), jnp.array([0, 1, 0, 0]))
    assert got.sum(axis=1).tolist() == [0, 1, V, V]


def test_a_trace_has_the_state_before_every_token_and_the_last_one():
    tokens = jnp.array([[0, 1, 2, 4], [0, 0, 1, 1]])
    path = fa.trace(chain(2), jnp.array([START, START]), tokens)
    assert path.tolist() == [[3, 4, 5, END, END], [3, 4, DEAD, DEAD, DEAD]]
    ends = fa.advance(chain(2), jnp.array([START, START]), tokens, jnp.array([2, 0]))
    assert ends.tolist() == [5, 3]


def test_padding_adds_dead_states_and_classes_without_tokens():
    automaton = TokenAutomaton.create([0, 1], [[0, 0], [1, 1], [2, 2], [3, 2]], multiple=8)
    assert automaton.next_states.shape == (8, 8)
    assert automaton.distances.tolist() == [UNREACHABLE, 0, 0, 1] + [UNREACHABLE] * 4


@pytest.mark.parametrize(
    'classes, next_states, message',
    [
        ([0, 2], [[0, 0], [1, 1], [2, 2]], r'token_classes must lie in \[0, 2\)'),
        ([0, 1], [[0, 0], [1, 1], [2, 3]], r'next_states must lie in \[0, 3\)'),
        ([0, 1], [[0, 0], [1, 1], [2, 0]], 'Every token must lead from state 2 back to it'),
    ],
)
def test_tables_that_do_not_fit_are_refused(classes, next_states, message):
    with pytest.raises(ValueError, match=message):
        TokenAutomaton.create(classes, next_states)


def test_logits_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match='The logits have 6 tokens, the automaton 5'):
        condition(chain(1), jnp.zeros((1, C, 6)), jnp.array([START]), jnp.array([9]))
