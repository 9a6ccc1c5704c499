import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import toy

from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, diffusion, pad_prompts
from diffusiongemma.sampling.passes import extend
from diffusiongemma.sampling.randomness import fold_in_rows, row_keys
from diffusiongemma.sampling.sampler import prefilled
from diffusiongemma.sampling.state import CanvasTask

C, PAD = 4, 22
PROMPTS = [[2, 5, 7, 11, 3], [4], [9, 9, 6]]
KEY = jax.random.key(0)
EVERY_MODE = pytest.mark.parametrize('mode', ['diffusion', 'autoregressive', 'lossless'])


def config(**fields):
    """Returns a config without stop tokens and with its own pad token."""
    fields = {'max_new_tokens': 16, 'stop_ids': (), 'pad_id': PAD, 'vocab_size': PAD} | fields
    return SamplingConfig(**fields)


FEW_STEPS = config(max_denoising_steps=2)  # the committed tokens still depend on the draws


@functools.cache
def sample(sampling_config, mode='diffusion', prompts=3, width=8, seed=0):
    """Returns the sampler's output for the first `prompts` of PROMPTS, as numpy arrays."""
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS[:prompts], PAD, width=width)
    sampler = Sampler(model, sampling_config, mode)
    return jax.tree.map(np.asarray, sampler(params, tokens, lengths, rng=jax.random.key(seed)))


def prompts_in_cache(sampling_config):
    """Returns the toy, its parameters and the state after PROMPTS."""
    model, params = toy(C)
    tokens, lengths = jax.tree.map(jnp.asarray, pad_prompts(PROMPTS, PAD, width=8))
    state, _ = prefilled(model, sampling_config, params, tokens, lengths, KEY, Controls())
    return model, params, state


def canvas_of_every_row(**fields):
    """Returns a canvas task of three rows with the keys of KEY."""
    last_token = jnp.array([prompt[-1] for prompt in PROMPTS])
    active = jnp.ones(3, bool)
    return CanvasTask(
        **({'keys': row_keys(KEY, 3), 'active': active, 'last_token': last_token} | fields)
    )


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def config_that_stops_row_0(mode, index):
    """Returns a config with a stop token that row 0 writes at `index`, and no row earlier."""
    tokens = sample(config(), mode).tokens
    stop = int(tokens[0, index])
    assert stop not in tokens[0, :index]
    return config(stop_ids=(stop,))


def first_new_index(mode, minimum):
    """Returns the first index from `minimum` on at which row 0 has a new token."""
    row = sample(config(), mode).tokens[0].tolist()
    return next(i for i in range(minimum, len(row)) if row[i] not in row[:i])


# Tests of the diffusion loop.


def test_canvases_follow_the_models_rule_at_temperature_zero():
    """The toy's target at a position is a function of the tokens before the canvas."""
    tokens = sample(config(temperature=0, vocab_size=23)).tokens
    for prompt, response in zip(PROMPTS, tokens.tolist(), strict=True):
        known = list(prompt)
        for begin in range(0, 16, C):
            total = sum((token + 1) * (i + 2) for i, token in enumerate(known))
            wanted = [(total + 5 * (len(known) + j)) % 23 for j in range(C)]
            assert response[begin : begin + C] == wanted
            known += wanted


def test_rows_stop_at_their_own_step_and_before_the_limit():
    steps = sample(config(max_new_tokens=C)).denoising_steps
    assert len(set(steps.tolist())) > 1
    assert (steps >= 2).all() and (steps < 48).all()


def test_without_early_stop_every_canvas_takes_all_steps():
    output = sample(config(max_denoising_steps=5, confidence_threshold=0))
    assert output.denoising_steps.tolist() == [20, 20, 20]
    assert output.canvases.tolist() == [4, 4, 4]
    np.testing.assert_allclose(output.tokens_per_denoise_pass, 16 / 20)


@dataclasses.dataclass(frozen=True)
class AcceptEverything:
    def next_canvas(self, proposal):
        return proposal.candidates


@dataclasses.dataclass(frozen=True)
class StopAfterFirst:
    history_length = 1

    def should_stop(self, argmax_history, entropies):
        return jnp.ones(entropies.shape[0], bool)


@pytest.mark.slow
def test_rules_of_ones_own_replace_the_built_in_ones():
    at_once = sample(config(stopping=StopAfterFirst()))
    assert at_once.denoising_steps.tolist() == at_once.canvases.tolist() == [4, 4, 4]
    everything = sample(config(max_denoising_steps=2, acceptance=AcceptEverything()))
    assert_same(everything, sample(config(max_denoising_steps=2, entropy_bound=float('inf'))))
    assert (everything.tokens != sample(FEW_STEPS).tokens).any()


@pytest.mark.slow
def test_a_stopped_row_keeps_its_canvas_history_and_soft_embeddings():
    model, params, state = prompts_in_cache(config())
    task, once = canvas_of_every_row(), config(max_denoising_steps=1)
    before = diffusion.denoise_canvas(model, once, params, state.cache, task)
    before = before.replace(stopped=jnp.array([False, True, False]))
    after = diffusion.denoise_step(model, config(), params, state.cache, task, before)
    for name in ('canvas', 'argmax_history', 'entropies', 'soft_embeddings', 'steps'):
        old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        np.testing.assert_array_equal(new[1], old[1])
        assert (new[0] != old[0]).any() and (new[2] != old[2]).any()


def test_denoise_steps_accept_candidates_and_renoise_the_rest():
    """Bound 0 accepts one position per step; the others are redrawn in each step."""
    few = config(entropy_bound=0.0, confidence_threshold=0)
    model, params, state = prompts_in_cache(few)
    task = canvas_of_every_row()
    start = diffusion.first_noise(model, few, params, task)
    start = start.replace(canvas=jnp.zeros((3, C), jnp.int32))
    few_step, all_step = (
        diffusion.denoise_step(model, rule, params, state.cache, task, start)
        for rule in (few, config(entropy_bound=float('inf')))
    )
    assert (np.sum(np.asarray(few_step.canvas) == start.canvas, axis=-1) < C - 1).all()
    agree = np.asarray(few_step.canvas == all_step.canvas)
    assert agree.any(axis=-1).all() and not agree.all()
    np.testing.assert_array_equal(few_step.argmax, all_step.argmax)


def test_the_argmax_canvas_is_committed_unless_the_noisy_one_is_asked_for():
    one_step = config(max_denoising_steps=1)
    model, params, state = prompts_in_cache(one_step)
    task = canvas_of_every_row(keys=fold_in_rows(state.keys, 0))
    canvas = diffusion.denoise_canvas(model, one_step, params, state.cache, task)
    assert (canvas.argmax != canvas.canvas).any()
    np.testing.assert_array_equal(sample(one_step).tokens[:, :C], canvas.argmax)
    noisy = sample(dataclasses.replace(one_step, commits='canvas')).tokens[:, :C]
    np.testing.assert_array_equal(noisy, canvas.canvas)


def test_a_pinned_token_stays_in_its_place_and_takes_nothing_of_the_entropy_bound():
    bound = config(entropy_bound=0.0, max_denoising_steps=3)
    model, params, state = prompts_in_cache(bound)
    task = canvas_of_every_row(pinned=jnp.tile(jnp.array([-1, 7, -1, 5]), (3, 1)))
    canvas = diffusion.denoise_canvas(model, bound, params, state.cache, task)
    for result in (canvas.canvas, canvas.argmax):
        np.testing.assert_array_equal(result[:, [1, 3]], [[7, 5]] * 3)
    np.testing.assert_array_equal(canvas.entropies[:, [1, 3]], 0)


def test_every_canvas_starts_from_noise_of_its_own():
    tokens = sample(config(max_denoising_steps=1)).tokens.reshape(3, 4, C)
    assert np.mean(tokens[:, 1:] != tokens[:, :-1]) > 0.8


def test_every_step_draws_noise_of_its_own():
    few, once = config(entropy_bound=0.0), config(max_denoising_steps=1)
    model, params, state = prompts_in_cache(few)
    task = canvas_of_every_row()
    first = diffusion.denoise_canvas(model, once, params, state.cache, task)
    going_on = first.replace(stopped=jnp.zeros(3, bool))
    again = [
        diffusion.denoise_step(
            model, few, params, state.cache, task, going_on.replace(step=jnp.int32(n))
        )
        for n in (0, 1)
    ]
    assert np.mean(np.asarray(again[0].canvas != again[1].canvas)) > 0.5


def test_committing_leaves_the_cache_of_finished_rows_alone():
    model, params, state = prompts_in_cache(config())
    cache, block = state.cache, jnp.full((3, C), 6)
    _, longer = extend(model, params, cache, block, jnp.array([True, False, True]))
    assert longer.lengths.tolist() == [5 + C, 1, 3 + C]
    values, before = longer.kv['values'][:, 0, :, 0], cache.kv['values'][:, 0, :, 0]
    for row, length in enumerate(cache.lengths):
        np.testing.assert_array_equal(values[row, :length], before[row, :length])
    assert values[2, 3 : 3 + C].tolist() == [7 * (position + 2) for position in range(3, 3 + C)]


def test_noise_stays_below_the_noise_vocabulary():
    small = config(vocab_size=3, entropy_bound=0.0, max_denoising_steps=1)
    model, params, state = prompts_in_cache(small)
    canvas = diffusion.denoise_canvas(model, small, params, state.cache, canvas_of_every_row())
    assert (np.sum(np.asarray(canvas.canvas) < 3, axis=-1) >= C - 1).all()


# Tests of properties of every mode.


@EVERY_MODE
def test_the_same_key_gives_the_same_tokens_and_another_key_others(mode):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS, PAD, width=8)
    again = Sampler(model, FEW_STEPS, mode)(params, tokens, lengths, rng=jax.random.key(0))
    assert_same(sample(FEW_STEPS, mode), jax.tree.map(np.asarray, again))
    assert (sample(FEW_STEPS, mode, seed=1).tokens != again.tokens).any()


@EVERY_MODE
def test_rows_of_a_ragged_batch_equal_single_runs(mode):
    batch = sample(FEW_STEPS, mode)
    model, params = toy(C)
    keys = row_keys(KEY, 3)
    for row, prompt in enumerate(PROMPTS):
        tokens, lengths = pad_prompts([prompt], PAD, multiple=1)
        single = Sampler(model, FEW_STEPS, mode)(params, tokens, lengths, rng=keys[row : row + 1])
        assert_same(
            jax.tree.map(lambda a: np.asarray(a)[0], single),
            jax.tree.map(lambda a, r=row: a[r], batch),
        )


def test_the_key_of_a_row_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(
        jax.random.key_data(row_keys(KEY, 2)), jax.random.key_data(row_keys(KEY, 5)[:2])
    )


@EVERY_MODE
def test_what_stands_in_the_padding_of_a_prompt_does_not_matter(mode):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS, 13, width=8)
    output = Sampler(model, config(), mode)(params, tokens, lengths, rng=KEY)
    assert_same(sample(config(), mode), jax.tree.map(np.asarray, output))


@EVERY_MODE
def test_raw_keys_give_the_tokens_of_typed_ones(mode):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS, PAD, width=8)
    output = Sampler(model, config(), mode)(params, tokens, lengths, rng=jax.random.PRNGKey(0))
    assert_same(sample(config(), mode), jax.tree.map(np.asarray, output))


@EVERY_MODE
@pytest.mark.parametrize(
    'minimum',
    [
        pytest.param(1, id='in the first canvas'),
        pytest.param(C, id='in a later canvas', marks=pytest.mark.slow),
    ],
)
def test_a_finished_row_never_changes_while_others_go_on(mode, minimum):
    index = first_new_index(mode, minimum)
    stopping = config_that_stops_row_0(mode, index)
    free, output = sample(config(), mode), sample(stopping, mode)
    assert output.lengths[0] == index + 1
    np.testing.assert_array_equal(output.tokens[0, : index + 1], free.tokens[0, : index + 1])
    assert (output.tokens[0, index + 1 :] == PAD).all()
    assert (output.lengths[1:] > index + C).any()
    alone = sample(stopping, mode, prompts=1)
    assert_same(alone, jax.tree.map(lambda a: a[:1], output))


@EVERY_MODE
def test_everything_after_the_stop_token_is_pad(mode):
    stops = (3, 8, 14, 19)
    output = sample(config(stop_ids=stops, max_new_tokens=14), mode)
    stopped = 0
    for row, length in zip(output.tokens.tolist(), output.lengths.tolist(), strict=True):
        assert not set(row[: length - 1]) & set(stops)
        assert set(row[length:]) <= {PAD}
        assert row[length - 1] in stops or length == 14
        stopped += row[length - 1] in stops
    assert stopped


@EVERY_MODE
def test_a_stop_token_at_position_0_leaves_one_token(mode):
    output = sample(config(stop_ids=tuple(range(23))), mode)
    assert output.lengths.tolist() == [1, 1, 1]
    assert (output.tokens[:, 1:] == PAD).all() and (output.tokens[:, 0] != PAD).all()
    assert output.canvases.tolist() == ([0] * 3 if mode == 'autoregressive' else [1] * 3)


@EVERY_MODE
@pytest.mark.parametrize('limit', [pytest.param(3, marks=pytest.mark.slow), 6])
def test_a_limit_inside_a_canvas_cuts_the_response_there(mode, limit):
    output = sample(config(max_new_tokens=limit), mode)
    np.testing.assert_array_equal(output.tokens, sample(config(), mode).tokens[:, :limit])
    assert output.lengths.tolist() == [limit] * 3


@EVERY_MODE
def test_a_stop_token_behind_the_limit_does_not_count(mode):
    index = first_new_index(mode, 2)
    stopping = config_that_stops_row_0(mode, index)
    cut = sample(config(stop_ids=stopping.stop_ids, max_new_tokens=index), mode)
    assert cut.lengths[0] == index


@EVERY_MODE
def test_the_sampler_runs_inside_another_jit_without_transfers_to_the_host(mode):
    model, params = toy(C)
    tokens, lengths = jax.tree.map(jnp.asarray, pad_prompts(PROMPTS, PAD, width=8))
    sampler = Sampler(model, config(), mode)

    @jax.jit
    def lengths_and_mean(params, tokens, lengths, rng):
        output = sampler(params, tokens, lengths, rng=rng)
        return output, jnp.mean(output.lengths)

    compiled = lengths_and_mean.lower(params, tokens, lengths, KEY).compile()
    with jax.transfer_guard('disallow'):
        output, mean = jax.block_until_ready(compiled(params, tokens, lengths, KEY))
    assert_same(sample(config(), mode), jax.tree.map(np.asarray, output))
    assert mean == 16


@pytest.mark.slow
@EVERY_MODE
def test_streamed_blocks_put_side_by_side_are_the_calls_output(mode):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS, PAD, width=8)
    index = first_new_index(mode, 1)
    stops = config_that_stops_row_0(mode, index).stop_ids
    sampler = Sampler(model, config(stop_ids=stops, max_new_tokens=14), mode)
    blocks = list(sampler.stream(params, tokens, lengths, rng=KEY))
    whole = sampler(params, tokens, lengths, rng=KEY)
    for row in range(3):
        parts = [block.tokens[row, : block.lengths[row]] for block in blocks]
        np.testing.assert_array_equal(
            np.concatenate(parts), whole.tokens[row, : whole.lengths[row]]
        )
        assert all((block.tokens[row, block.lengths[row] :] == PAD).all() for block in blocks)
    for name in ('lengths', 'denoising_steps', 'canvases'):
        total = sum(np.asarray(getattr(block, name)) for block in blocks)
        np.testing.assert_array_equal(total, getattr(whole, name))
    assert len(blocks) > 1 and blocks[-1].lengths[0] == 0


@pytest.mark.parametrize(
    'mode',
    [
        'diffusion',
        pytest.param('autoregressive', marks=pytest.mark.slow),
        pytest.param('lossless', marks=pytest.mark.slow),
    ],
)
def test_a_stream_leaves_its_arguments_to_the_caller(mode):
    """The state contains the arguments, and its buffers are donated to the next block."""
    model, params = toy(C)
    prompts = jax.tree.map(jnp.asarray, pad_prompts(PROMPTS, PAD, width=8))
    keys, sets = jax.random.split(KEY, 3), jnp.ones((1, 23), bool)
    controls = Controls(temperature=jnp.array([0.0, 0.5, 1.0]), allowed_sets=sets)
    sampler = Sampler(model, config(max_new_tokens=8, max_denoising_steps=2), mode)
    blocks = list(sampler.stream(params, *prompts, rng=keys, controls=controls))
    whole = sampler(params, *prompts, rng=keys, controls=controls)
    np.testing.assert_array_equal(sum(block.lengths for block in blocks), whole.lengths)
    # The first block is still readable, so its buffers were not donated.
    assert int(blocks[0].tokens[0, 0]) == int(whole.tokens[0, 0])


# Tests of the autoregressive mode.


def naive_greedy(model, params, prompt, count):
    """Decodes token by token over the whole sequence, without a cache."""

    @jax.jit
    def next_token(tokens, length):
        positions = jnp.arange(tokens.shape[1])[None]
        segment_ids = (positions < length).astype(jnp.int32)
        hidden, _ = model.apply({'params': params}, tokens, positions, segment_ids, method='encode')
        return jnp.argmax(model.apply({'params': params}, hidden[0], method='unembed')[length - 1])

    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), tokens.shape[1]):
        tokens[0, length] = next_token(tokens, length)
    return tokens[0, len(prompt) :].tolist()


def test_greedy_autoregression_equals_a_loop_without_cache():
    model, params = toy(C)
    output = sample(config(temperature=0, vocab_size=23), 'autoregressive')
    for prompt, row in zip(PROMPTS, output.tokens.tolist(), strict=True):
        assert row == naive_greedy(model, params, prompt, 16)


def test_an_autoregressive_token_costs_one_forward_pass():
    output = sample(config(stop_ids=(3, 8, 14, 19)), 'autoregressive')
    np.testing.assert_array_equal(output.denoising_steps, output.lengths)
    np.testing.assert_array_equal(output.tokens_per_denoise_pass, 1)


def test_draws_follow_the_models_distribution_at_the_temperature():
    model, params = toy(C)
    count = 2000
    tokens, lengths = np.tile([[2, 5, 7]], (count, 1)), np.full(count, 3)
    one = config(max_new_tokens=1, temperature=2.0, vocab_size=23)
    drawn = Sampler(model, one, 'autoregressive')(params, tokens, lengths, rng=KEY).tokens[:, 0]
    hidden, _ = model.apply(
        {'params': params},
        jnp.asarray([[2, 5, 7]]),
        jnp.arange(3)[None],
        jnp.ones((1, 3), int),
        method='encode',
    )
    logits = model.apply({'params': params}, hidden[0, -1], method='unembed')
    frequencies = np.bincount(drawn, minlength=23) / count
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits / 2.0), atol=0.03)
