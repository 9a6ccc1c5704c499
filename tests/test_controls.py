"""Tests settings and constraints per row in every mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import toy

from diffusiongemma.constraints.automaton import FREE, START, TokenAutomaton
from diffusiongemma.sampling import (
    Controls,
    Sampler,
    SamplingConfig,
    allow,
    ban,
    exact_lengths,
    pad_prompts,
    pin,
)
from diffusiongemma.sampling.sampler import MODES

C, PAD, V, LIMIT = 4, 22, 23, 14
PROMPTS = [[2, 5, 7, 11, 3], [4], [9, 9, 6]]
KEY = jax.random.key(0)
EVERY_MODE = pytest.mark.parametrize('mode', ['diffusion', 'autoregressive', 'lossless'])
# Lossless decoding drafts as diffusion does and verifies as autoregression does.
MOSTLY_LOSSLESS = pytest.mark.parametrize(
    'mode',
    [
        pytest.param('diffusion', marks=pytest.mark.slow),
        pytest.param('autoregressive', marks=pytest.mark.slow),
        'lossless',
    ],
)
CONFIG = SamplingConfig(
    max_new_tokens=LIMIT, max_denoising_steps=3, stop_ids=(), pad_id=PAD, vocab_size=PAD
)
GREEDY = dataclasses.replace(CONFIG, temperature=0)


@functools.cache
def sampler_of(mode, config):
    return Sampler(toy(C)[0], config, mode)


def sample(mode, controls=None, config=CONFIG, prompts=PROMPTS):
    tokens, lengths = pad_prompts(prompts, PAD, width=8)
    output = sampler_of(mode, config)(toy(C)[1], tokens, lengths, rng=KEY, controls=controls)
    return jax.tree.map(np.asarray, output)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Tests of settings per row.


@pytest.mark.slow
@EVERY_MODE
def test_a_row_has_the_temperature_that_it_asks_for(mode):
    mixed = sample(mode, Controls(temperature=jnp.array([0.0, 3.0, 0.0])))
    hot = dataclasses.replace(CONFIG, temperature=3.0)
    greedy, drawn = sample(mode, config=GREEDY), sample(mode, config=hot)
    for row, expected in enumerate((greedy, drawn, greedy)):
        np.testing.assert_array_equal(mixed.tokens[row], expected.tokens[row])
    assert (greedy.tokens != drawn.tokens)[:2].any(axis=-1).all()


@MOSTLY_LOSSLESS
def test_a_row_has_the_top_p_that_it_asks_for(mode):
    mixed = sample(mode, Controls(top_p=jnp.array([0.3, 1.0, 0.3])))
    narrow = sample(mode, config=dataclasses.replace(CONFIG, top_p=0.3))
    whole = sample(mode)
    for row, expected in enumerate((narrow, whole, narrow)):
        np.testing.assert_array_equal(mixed.tokens[row], expected.tokens[row])
    assert (narrow.tokens != whole.tokens).any()


@EVERY_MODE
def test_a_row_ends_at_its_own_limit(mode):
    limits = [3, 0, LIMIT]
    output, free = sample(mode, Controls(max_new_tokens=jnp.array(limits))), sample(mode)
    assert output.lengths.tolist() == limits
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(output.tokens[row, :limit], free.tokens[row, :limit])
        assert (output.tokens[row, limit:] == PAD).all()
    assert output.denoising_steps[1] == 0 and output.canvases[1] == 0


@pytest.mark.slow
@EVERY_MODE
@pytest.mark.parametrize('fields', [{'top_k': 1}, {'top_p': 1e-6}], ids=['top_k', 'top_p'])
def test_the_likeliest_token_alone_is_greedy(mode, fields):
    narrow = sample(mode, config=dataclasses.replace(CONFIG, **fields))
    np.testing.assert_array_equal(narrow.tokens, sample(mode, config=GREEDY).tokens)


# Tests of the tokens that may stand at a position.


@EVERY_MODE
@pytest.mark.parametrize(
    'config',
    [pytest.param(CONFIG, id='sampled'), pytest.param(GREEDY, id='greedy', marks=pytest.mark.slow)],
)
def test_pinned_tokens_stand_in_their_places_and_the_rest_follows_them(mode, config):
    pinned = pin([[None, 7, None, None, None, 20, 21], [], [1]])
    output, free = sample(mode, Controls(pinned=pinned), config), sample(mode, config=config)
    assert output.tokens[0, [1, 5, 6]].tolist() == [7, 20, 21] and output.tokens[2, 0] == 1
    np.testing.assert_array_equal(output.tokens[1], free.tokens[1])
    assert (
        output.tokens[0, 7:] != free.tokens[0, 7:]
    ).any()  # later tokens depend on the pinned ones


@pytest.mark.slow
@EVERY_MODE
def test_sets_hold_for_a_call_or_position_by_position(mode):
    few = [3, 8, 15]
    everywhere = Controls(allowed_sets=allow(few, V)[None])
    assert set(sample(mode, everywhere).tokens.flat) == set(few)
    sets = jnp.stack([ban(few, V), allow([6], V)])
    index = jnp.array([[0] * LIMIT, [-1] * LIMIT, [-1, 1, 0, 1] + [-1] * (LIMIT - 4)])
    output = sample(mode, Controls(allowed_sets=sets, allowed_index=index))
    assert not set(output.tokens[0]) & set(few)
    np.testing.assert_array_equal(output.tokens[1], sample(mode).tokens[1])
    assert output.tokens[2, [1, 3]].tolist() == [6, 6] and output.tokens[2, 2] not in few


@EVERY_MODE
def test_a_short_table_leaves_later_positions_open(mode):
    sets, index = allow([6], V)[None], jnp.zeros((3, 2), int)
    output = sample(mode, Controls(allowed_sets=sets, allowed_index=index))
    assert (output.tokens[:, :2] == 6).all() and (output.tokens[:, 2:] != 6).any()


@EVERY_MODE
def test_responses_have_the_length_that_is_asked_for(mode):
    stop = 13
    config = dataclasses.replace(CONFIG, stop_ids=(stop, 14))
    wanted = [1, 6, LIMIT]
    output = sample(mode, exact_lengths(wanted, config.stop_ids, V), config)
    assert output.lengths.tolist() == wanted
    for row, length in zip(output.tokens, wanted, strict=True):
        assert row[length - 1] == stop and not set(row[: length - 1]) & {stop, 14}


def test_a_seeded_canvas_starts_from_its_seed():
    """If it starts from the correct text, the toy is certain after one step."""
    many_steps = dataclasses.replace(GREEDY, max_denoising_steps=20, vocab_size=V)
    unseeded = sample('diffusion', config=many_steps)
    seeded = sample('diffusion', Controls(seed=jnp.asarray(unseeded.tokens)), many_steps)
    np.testing.assert_array_equal(seeded.tokens, unseeded.tokens)
    assert (seeded.denoising_steps < unseeded.denoising_steps).all()


# The tests compare a guarantee with the behavior without it.


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_lossless_equals_autoregression_under_constraints(temperature):
    sets = jnp.stack([ban([3, 8], V), allow(range(5, 20), V)])
    rng = np.random.default_rng(0)
    rows = 200
    prompts = [rng.integers(0, 22, rng.integers(1, 9)).tolist() for _ in range(rows)]
    controls = Controls(
        temperature=jnp.full(rows, temperature),
        pinned=jnp.asarray(
            np.where(rng.random((rows, 9)) < 0.2, rng.integers(5, 8, (rows, 9)), -1)
        ),
        allowed_sets=sets,
        allowed_index=jnp.asarray(rng.integers(-1, 2, (rows, LIMIT))),
        max_new_tokens=jnp.asarray(rng.integers(0, LIMIT + 1, rows)),
    )
    # Both draw from a single token, so that equal distributions give equal draws.
    config = dataclasses.replace(CONFIG, top_k=1)
    expected, found = (
        sample(mode, controls, config, prompts) for mode in ('autoregressive', 'lossless')
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)


@EVERY_MODE
def test_other_values_do_not_compile_anew(mode):
    def controls(seed):
        rng = np.random.default_rng(seed)
        return Controls(
            temperature=jnp.asarray(rng.random(3), jnp.float32),
            pinned=jnp.asarray(rng.integers(-1, 2, (3, 5))),
            seed=jnp.asarray(rng.integers(-1, 2, (3, 5))),
            allowed_sets=jnp.asarray(rng.random((2, V)) < 0.9).at[:, :2].set(True),
            allowed_index=jnp.asarray(rng.integers(-1, 2, (3, 9))),
        )

    sample(mode, controls(0))
    compiled = MODES[mode].generate._cache_size()
    first, second = sample(mode, controls(1)), sample(mode, controls(2))
    assert MODES[mode].generate._cache_size() == compiled
    assert (first.tokens != second.tokens).any()


@MOSTLY_LOSSLESS
def test_a_set_that_bans_everything_inside_another_jit_is_ignored_and_never_nan(mode):
    @jax.jit
    def run(sets):
        tokens, lengths = pad_prompts(PROMPTS, PAD, width=8)
        controls = Controls(allowed_sets=sets)
        return sampler_of(mode, CONFIG)(toy(C)[1], tokens, lengths, rng=KEY, controls=controls)

    np.testing.assert_array_equal(run(jnp.zeros((1, V), bool)).tokens, sample(mode).tokens)


BAD = {
    'a shape per row': (Controls(temperature=jnp.zeros(2)), 'controls.temperature must hold one'),
    'a negative temperature': (
        Controls(temperature=jnp.array([0.5, -1.0, 0.0])),
        r'controls.temperature\[1\] is -1.0, but must lie in \[0',
    ),
    'a limit over the config': (
        Controls(max_new_tokens=jnp.array([1, 2, LIMIT + 1])),
        rf'controls.max_new_tokens\[2\] is {LIMIT + 1}, but must lie in \[0, {LIMIT}\]',
    ),
    'a token outside the vocabulary': (
        Controls(pinned=jnp.full((3, 2), V)),
        rf'controls.pinned\[0, 0\] is {V}',
    ),
    'rows that are missing': (Controls(seed=jnp.zeros((2, 2), int)), r'controls.seed must be \[3'),
    'sets of another vocabulary': (
        Controls(allowed_sets=jnp.ones((1, 5), bool)),
        rf'controls.allowed_sets must be \[sets, {V}\] bool',
    ),
    'an index without sets': (Controls(allowed_index=jnp.zeros((3, 2), int)), 'needs allowed_sets'),
    'an index out of range': (
        Controls(allowed_sets=ban([], V)[None], allowed_index=jnp.ones((3, 2), int)),
        r'controls.allowed_index\[0, 0\] is 1',
    ),
    'a set that bans everything': (
        Controls(allowed_sets=allow([], V)[None], allowed_index=jnp.array([[-1, 0]] * 3)),
        'bans every token at position 1 of row 0',
    ),
    'a pinned token that is banned': (
        Controls(allowed_sets=ban([7], V)[None], pinned=pin([[], [None, 7], []])),
        'pin token 7 at position 1 of row 1',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_controls_are_one_clear_error(case):
    controls, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        sample('diffusion', controls)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'top_k': 0}, 'top_k must be >= 1'),
        ({'top_p': 0.0}, r'top_p must lie in \(0, 1\]'),
        ({'commits': 'nothing'}, "commits must be 'argmax' or 'canvas'"),
        ({'temperature_exponent': 0.0}, 'exponent must be finite and > 0'),
    ],
)
def test_bad_settings_are_one_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


@pytest.mark.parametrize('function', [allow, ban])
@pytest.mark.parametrize('token', [-1, V])
def test_only_token_ids_can_be_allowed_or_banned(function, token):
    with pytest.raises(ValueError, match=rf'must be integers in \[0, {V}\), got \[{token}\]'):
        function([3, token], V)


def test_a_length_target_needs_a_length_and_a_stop_token():
    with pytest.raises(ValueError, match='lengths must be >= 1'):
        exact_lengths([3, 0], (1,), V)
    with pytest.raises(ValueError, match='needs a stop token'):
        exact_lengths([3], (), V)


# Tests of valid responses.

STOP = 1
# Pairs (a, b) with a in {5, 6, 7} and b = a + 10, one or more of them, then the stop token.
PAIRS = TokenAutomaton.create(
    np.array([0, 1, 0, 0, 0, 2, 3, 4, *[0] * 7, 5, 6, 7, *[0] * 5]),
    np.array(
        [
            [0] * 8,
            [1] * 8,
            [2] * 8,
            [0, 0, 4, 5, 6, 0, 0, 0],  # START
            [0, 0, 0, 0, 0, 7, 0, 0],
            [0, 0, 0, 0, 0, 0, 7, 0],
            [0, 0, 0, 0, 0, 0, 0, 7],
            [0, 2, 4, 5, 6, 0, 0, 0],  # after a pair
        ]
    ),
)
VALID = dataclasses.replace(CONFIG, stop_ids=(STOP,), max_new_tokens=13)


def assert_valid(row, length):
    row = row[:length].tolist()
    assert row[-1] == STOP and length % 2 == 1 and length > 1
    assert all(a in (5, 6, 7) and b == a + 10 for a, b in zip(row[:-1:2], row[1::2], strict=True))


@EVERY_MODE
@pytest.mark.parametrize('temperature', [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_every_response_is_one_that_the_automaton_accepts(mode, temperature):
    """This holds for any model outputs, over several canvases, with limits per row."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 22, rng.integers(1, 9)).tolist() for _ in range(60)]
    limits = rng.integers(3, 14, 60)
    states = np.where(np.arange(60) % 10 == 9, FREE, START)
    controls = Controls(
        temperature=jnp.full(60, temperature),
        max_new_tokens=jnp.asarray(limits),
        automaton=PAIRS,
        automaton_states=jnp.asarray(states),
    )
    output = sample(mode, controls, VALID, prompts)
    free = sample(mode, controls.replace(automaton=None, automaton_states=None), VALID, prompts)
    for row, length, limit, state in zip(
        output.tokens, output.lengths, limits, states, strict=True
    ):
        if state == START:
            assert_valid(row, length)
            assert length <= limit
    np.testing.assert_array_equal(output.tokens[states == FREE], free.tokens[states == FREE])
    constrained = output.tokens[states == START]
    assert len({tuple(row) for row in constrained.tolist()}) > (5 if temperature else 1)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_lossless_equals_autoregression_under_an_automaton(temperature):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 22, rng.integers(1, 9)).tolist() for _ in range(100)]
    controls = Controls(temperature=jnp.full(100, temperature), automaton=PAIRS)
    config = dataclasses.replace(VALID, top_k=1)
    expected, found = (
        sample(mode, controls, config, prompts) for mode in ('autoregressive', 'lossless')
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_pinned_tokens_and_sets_hold_beside_an_automaton():
    controls = Controls(
        automaton=PAIRS, pinned=pin([[None, None, 7], [], []]), allowed_sets=ban([5, 15], V)[None]
    )
    output = sample('diffusion', controls, VALID)
    for row, length in zip(output.tokens, output.lengths, strict=True):
        assert_valid(row, length)
        assert not set(row[:length]) & {5, 15}
    assert output.tokens[0, 2] == 7


@pytest.mark.parametrize(
    'controls, config, message',
    [
        (Controls(automaton_states=jnp.zeros(3, int)), VALID, 'needs the automaton'),
        (
            Controls(automaton=PAIRS, max_new_tokens=jnp.array([5, 2, 5])),
            VALID,
            'shortest valid response of row 1 has 3 tokens, more than its limit of 2',
        ),
        (
            Controls(automaton=PAIRS.replace(token_classes=jnp.zeros(5, int))),
            VALID,
            'automaton has 5 tokens and the model has 23',
        ),
        (Controls(automaton=PAIRS), dataclasses.replace(VALID, top_k=3), 'cannot be combined'),
    ],
    ids=['states alone', 'too short a limit', 'another vocabulary', 'top_k'],
)
def test_automata_that_are_unfit_are_one_clear_error(controls, config, message):
    with pytest.raises(ValueError, match=message):
        sample('diffusion', controls, config)
