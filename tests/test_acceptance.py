import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiongemma.sampling import EntropyBound
from diffusiongemma.sampling.epilogue import entropy

GOLDEN = pathlib.Path(__file__).parent / 'data' / 'tiny_moe' / 'golden.npz'
SLACK = 1e-5  # float32 sums


def entropy_lists(**kwargs):
    values = st.floats(0.0, 8.0, width=32)
    return st.lists(values, min_size=1, max_size=12, **kwargs).map(np.float32)


def accept(entropies, bound):
    return np.asarray(EntropyBound(bound).accept(jnp.asarray(entropies)))


@pytest.fixture(scope='module')
def golden():
    return np.load(GOLDEN)


def test_entropies_equal_those_of_the_reference(golden):
    ours = entropy(jnp.asarray(golden['logits_step0']) / 0.8)
    np.testing.assert_allclose(ours, golden['token_entropy'], rtol=1e-5, atol=1e-5)


def test_accepted_positions_equal_those_of_the_reference(golden):
    entropies = entropy(jnp.asarray(golden['logits_step0']) / 0.8)
    accepted = accept(entropies, float(golden['entropy_bound']))
    assert 0 < golden['accepted'].sum() < golden['accepted'].size
    np.testing.assert_array_equal(accepted, golden['accepted'])


def test_the_largest_entropy_of_the_accepted_does_not_count():
    np.testing.assert_array_equal(
        accept([0.3, 0.05, 2.0, 0.04], bound=0.1), [True, True, False, True]
    )


def test_a_sum_that_equals_the_bound_is_accepted():
    np.testing.assert_array_equal(accept([0.5, 0.25, 0.25], bound=0.5), [True, True, True])


@given(entropy_lists(), st.floats(0.0, 10.0))
@settings(max_examples=100, deadline=None)
def test_only_the_first_accepted_position_may_exceed_the_bound(entropies, bound):
    chosen = np.sort(entropies[accept(entropies, bound)].astype(np.float64))
    assert chosen[:-1].sum() <= bound + SLACK


@given(entropy_lists(), st.floats(0.0, 10.0))
@settings(max_examples=100, deadline=None)
def test_no_further_position_fits_under_the_bound(entropies, bound):
    accepted = accept(entropies, bound)
    chosen, others = entropies[accepted], entropies[~accepted]
    if others.size:
        assert chosen.max() <= others.min()
        assert chosen.astype(np.float64).sum() > bound - SLACK


@given(entropy_lists(), st.floats(0.0, 10.0))
@settings(max_examples=100, deadline=None)
def test_every_step_accepts_at_least_one_position(entropies, bound):
    assert accept(entropies, bound).any()


@pytest.mark.parametrize('odd', [np.inf, np.nan])
def test_one_position_is_accepted_even_of_broken_predictions(odd):
    assert accept(np.full((2, 5), odd, np.float32), bound=0.1).sum(axis=-1).tolist() == [1, 1]


@given(entropy_lists(unique=True), st.floats(0.0, 10.0), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_permuted_positions_are_accepted_alike(entropies, bound, random):
    order = list(range(len(entropies)))
    random.shuffle(order)
    np.testing.assert_array_equal(accept(entropies, bound)[order], accept(entropies[order], bound))


def test_of_equal_entropies_the_first_is_accepted():
    np.testing.assert_array_equal(accept([1.0, 1.0, 1.0], bound=0.1), [True, False, False])


def test_rows_are_independent():
    rows = np.float32([[0.1, 3.0, 0.2], [5.0, 4.0, 0.0]])
    together = accept(rows, 0.25)
    np.testing.assert_array_equal(together, [accept(row, 0.25) for row in rows])


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match='entropy_bound must be >= 0 nats, got -0.1'):
        EntropyBound(-0.1)


def test_entropy_of_a_certain_position_is_zero_and_of_an_even_one_log_v():
    logits = jnp.array([[0.0, -jnp.inf, -jnp.inf, -jnp.inf], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_allclose(entropy(logits), [0.0, np.log(4)], atol=1e-6)
