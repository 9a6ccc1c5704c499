import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.sampling import (
    AllOf,
    MeanEntropy,
    Never,
    StableAndConfident,
    TemperatureSchedule,
    TokenStability,
)

SURE, UNSURE = 0.001, 0.02


def should_stop(rule, history, mean_entropy):
    """Applies a rule to one row with argmax canvases, oldest first, and equal entropies."""
    history = jnp.asarray(history, jnp.int32)[None]
    entropies = jnp.full((1, history.shape[-1]), mean_entropy, jnp.float32)
    return bool(rule.should_stop(history, entropies)[0])


def test_a_stable_and_confident_row_stops():
    assert should_stop(StableAndConfident(), [[4, 5], [4, 5]], SURE)


@pytest.mark.parametrize(
    'history, mean_entropy',
    [([[4, 6], [4, 5]], SURE), ([[4, 5], [4, 5]], UNSURE), ([[-1, -1], [4, 5]], SURE)],
    ids=['a changed token', 'an uncertain canvas', 'the first step'],
)
def test_a_row_goes_on_after(history, mean_entropy):
    assert not should_stop(StableAndConfident(), history, mean_entropy)


def test_all_canvases_of_the_window_must_agree():
    rule = StableAndConfident(stability_threshold=2)
    assert rule.history_length == 3
    assert should_stop(rule, [[4, 5], [4, 5], [4, 5]], SURE)
    assert not should_stop(rule, [[9, 5], [4, 5], [4, 5]], SURE)


def test_threshold_zero_needs_confidence_alone():
    rule = StableAndConfident(stability_threshold=0)
    assert should_stop(rule, [[4, 5]], SURE)
    assert not should_stop(rule, [[4, 5]], UNSURE)


def test_confidence_is_the_mean_over_the_canvas():
    history = jnp.zeros((2, 2, 4), jnp.int32)
    entropies = jnp.array([[0.019, 0.0, 0.0, 0.0], [0.021, 0.0, 0.0, 0.0]])
    assert StableAndConfident().should_stop(history, entropies).tolist() == [True, False]


def test_confidence_threshold_zero_never_stops():
    assert not should_stop(StableAndConfident(confidence_threshold=0), [[4], [4]], 0.0)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'stability_threshold': -1}, 'stability_threshold must be >= 0 steps, got -1'),
        ({'confidence_threshold': -0.5}, 'confidence_threshold must be >= 0 nats, got -0.5'),
    ],
)
def test_negative_thresholds_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StableAndConfident(**fields)


def test_temperature_falls_from_t_max_by_equal_steps_and_never_reaches_t_min():
    schedule = TemperatureSchedule(t_min=0.4, t_max=0.8, num_steps=4)
    temperatures = [schedule.temperature(schedule.noise_level(n)) for n in range(4)]
    np.testing.assert_allclose(temperatures, [0.8, 0.7, 0.6, 0.5])


@pytest.mark.parametrize('fields', [{'t_min': 0.0}, {'t_min': 0.9}, {'num_steps': 0}])
def test_an_impossible_schedule_is_refused(fields):
    with pytest.raises(ValueError):
        TemperatureSchedule(**fields)


def test_token_stability_looks_at_tokens_alone():
    rule = TokenStability(num_steps=2)
    assert should_stop(rule, [[4, 5], [4, 5], [4, 5]], UNSURE)
    assert not should_stop(rule, [[-1, -1], [4, 5], [4, 5]], SURE)


def test_mean_entropy_looks_at_entropies_alone():
    assert should_stop(MeanEntropy(0.005), [[-1, -1], [4, 5]], SURE)
    assert not should_stop(MeanEntropy(0.005), [[4, 5], [4, 5]], UNSURE)


def test_never_goes_on():
    assert not should_stop(Never(), [[4, 5], [4, 5]], 0.0)


def test_all_of_needs_every_rule_and_shows_each_its_own_history():
    both = AllOf((TokenStability(1), MeanEntropy(0.005)))
    assert both.history_length == 2
    for history in ([[4, 5], [4, 5]], [[4, 6], [4, 5]], [[-1, -1], [4, 5]]):
        for mean_entropy in (SURE, UNSURE):
            expected = should_stop(StableAndConfident(1, 0.005), history, mean_entropy)
            assert should_stop(both, history, mean_entropy) == expected
    three = AllOf([TokenStability(2), Never()])
    assert three.history_length == 3 and not should_stop(three, [[1], [1], [1]], 0.0)


@pytest.mark.parametrize(
    'make', [lambda: TokenStability(0), lambda: MeanEntropy(-1.0), lambda: AllOf(())]
)
def test_rules_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match='must be >=|at least one rule'):
        make()


def test_the_exponent_bends_the_temperatures_between_the_same_ends():
    linear, early = TemperatureSchedule(0.4, 0.8, 4), TemperatureSchedule(0.4, 0.8, 4, exponent=2.0)
    assert early.temperature(1.0) == linear.temperature(1.0) == 0.8
    assert early.temperature(0.0) == linear.temperature(0.0) == 0.4
    assert early.temperature(0.5) == pytest.approx(0.5)
