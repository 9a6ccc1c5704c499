"""Tests rules that read logits and have state: a predictor with a corrector, and remasking."""

import collections
import dataclasses
import functools
import itertools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from toy_model import ToyConfig, toy

from diffusiongemma.sampling import (
    Ancestral,
    Controls,
    Decoder,
    EntropyBound,
    GibbsSweep,
    Never,
    Proposal,
    Remask,
    Sampler,
    SamplingConfig,
    TopK,
    diffusion,
    pad_prompts,
    pin,
)
from diffusiongemma.sampling.acceptance import StatefulRule, first_state, next_canvas

V, C = 3, 3
CANVASES = np.array(list(itertools.product(range(V), repeat=C)))  # [V^C, C]


@functools.cache
def language(seed):
    """Returns probabilities [V^C] of a toy language with dependent positions."""
    weights = np.random.default_rng(seed).gamma(0.4, size=len(CANVASES))
    return weights / weights.sum()


def number(canvas):
    return canvas @ (V ** np.arange(C)[::-1])


def noised(level, seed=0):
    """Returns the joint distribution [x_0, x_t] of clean and noisy canvases under uniform noise."""
    kernel = (1 - level) * np.eye(V) + level / V
    rows = [kernel[CANVASES[:, None, i], CANVASES[None, :, i]] for i in range(C)]
    return language(seed)[:, None] * np.prod(rows, 0)


def denoised(joint):
    """Returns the log-probabilities [x_t, C, V] of the exact denoiser."""
    marginals = np.stack([[joint[CANVASES[:, i] == v].sum(0) for v in range(V)] for i in range(C)])
    return np.log(np.moveaxis(marginals, -1, 0) / joint.sum(0)[:, None, None])


def proposal_of(canvas, logits, key=0, **fields):
    canvas = jnp.asarray(canvas, jnp.int32)
    zeros = jnp.zeros(canvas.shape)
    candidate_key, noise_key, rule_key = jax.random.split(jax.random.key(key), 3)
    known = {
        'candidates': jax.random.categorical(candidate_key, logits),
        'noise': jax.random.randint(noise_key, canvas.shape, 0, V),
        'open': jnp.ones(canvas.shape, bool),
        'entropies': zeros, 'confidences': zeros, 'margins': zeros,
        'noise_level': jnp.float32(1.0), 'next_noise_level': jnp.float32(0.75),
        'keys': jax.random.split(rule_key, canvas.shape[0]), 'vocab_size': V,
    }  # fmt: skip
    return Proposal(canvas=canvas, logits=jnp.asarray(logits), **(known | fields))


@pytest.mark.parametrize('level', [0.8, 0.3])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_a_corrector_draws_a_token_given_the_others_at_the_same_noise_level(level, temperature):
    """The draw is p(x_t^i | the others) by Bayes' rule from the joint of noisy canvases.

    At other temperatures than 1, the clean token is drawn from the tempered prediction that does
    not depend on the current token of the position, with the same noise.
    """
    draws, joint = 4_000, noised(level)
    marginal, logits = joint.sum(0), denoised(joint)
    sweep = GibbsSweep(positions=1)
    for canvas in range(0, len(CANVASES), 5):
        proposal = proposal_of(
            np.tile(CANVASES[canvas], (draws, 1)),
            np.tile(logits[canvas] / temperature, (draws, 1, 1)),
            temperature=jnp.float32(temperature),
        )
        levels = jnp.full((draws, 1), level, jnp.float32)
        for place in range(C):
            corrected = sweep.correct(proposal, levels, jnp.full(draws, place + C, jnp.int32))
            others = np.delete(np.arange(C), place)
            assert (corrected[:, others] == CANVASES[canvas][others]).all()
            alike = (CANVASES[:, others] == CANVASES[canvas][others]).all(1)
            expected = (
                marginal[alike] / marginal[alike].sum()
            )  # in the order of the token at that position
            clean = (expected - level / V) / (1 - level)
            clean = clean ** (1 / temperature) / np.sum(clean ** (1 / temperature))
            expected = (1 - level) * clean + level / V
            drawn = np.bincount(corrected[:, place], minlength=V)
            assert scipy.stats.chisquare(drawn, draws * expected).pvalue > 1e-5


def test_a_sweep_comes_to_every_position_once_and_leaves_pinned_ones():
    length, sweep = 7, GibbsSweep(positions=3)
    canvas = jnp.zeros((1, length), jnp.int32)
    everywhere = 40.0 * jax.nn.one_hot(jnp.full((1, length), 2), V)
    proposal = proposal_of(canvas, everywhere, greedy=True)
    levels = jnp.full((1, 1), 0.5)
    drawn = [np.asarray(sweep.correct(proposal, levels, jnp.array([n])) == 2)[0] for n in range(3)]
    assert (np.sum(drawn, axis=0) == 1).all() and max(map(np.sum, drawn)) == 3
    closed = proposal.replace(open=jnp.array([[False] + [True] * (length - 1)]))
    assert not any(sweep.correct(closed, levels, jnp.array([n]))[0, 0] for n in range(3))
    clean = sweep.correct(proposal, jnp.zeros((1, 1)), jnp.array([0]))
    assert (clean == canvas).all()  # without noise a token depends only on itself


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A predictor that records the noise levels of its steps."""

    levels: list = dataclasses.field(default_factory=list, hash=False)

    def next_canvas(self, proposal):
        self.levels.append((float(proposal.noise_level), float(proposal.next_noise_level)))
        return proposal.candidates


@pytest.mark.parametrize('steps, correctors', [(7, 2), (8, 1), (4, 3)])
def test_predictor_steps_go_through_all_noise_levels_in_fewer_steps(steps, correctors):
    recorder = Recorder()
    sweep = GibbsSweep(recorder, correctors, positions=C)
    canvas, state = jnp.zeros((1, C), jnp.int32), sweep.first_state(jnp.zeros((1, C), jnp.int32))
    reached = []
    for n in range(steps):
        levels = {'noise_level': jnp.float32(1 - n / steps)}
        levels |= {'next_noise_level': jnp.float32(1 - (n + 1) / steps)}
        proposal = proposal_of(canvas, jnp.zeros((1, C, V)), key=n, **levels)
        canvas, state = sweep.next_canvas(proposal, state)
        reached.append(float(state.noise_level[0, 0]))
    predicted = recorder.levels[:: 1 + correctors]
    assert predicted[0][0] == 1 and reached[-1] == 0
    for (_, before), (after, _) in itertools.pairwise(predicted):
        assert before == pytest.approx(after, abs=1e-6)
    assert reached == pytest.approx(
        [predicted[n // (1 + correctors)][1] for n in range(steps)], abs=1e-6
    )


def test_correctors_lead_a_canvas_that_starts_as_noise_to_the_distribution_of_its_level():
    """30 sweeps at one level, from uniform noise, give p(x_t) of that level."""
    level, draws = 0.4, 6_000
    joint = noised(level)
    table, sweep = jnp.asarray(denoised(joint), jnp.float32), GibbsSweep(positions=1)
    levels = jnp.full((draws, 1), level, jnp.float32)

    def step(canvas, n):
        key = jax.random.fold_in(jax.random.key(3), n)
        logits = table[canvas @ (V ** jnp.arange(C)[::-1])]
        zeros = jnp.zeros(canvas.shape)
        proposal = Proposal(
            canvas=canvas, candidates=canvas, open=jnp.ones(canvas.shape, bool),
            noise=jax.random.randint(jax.random.fold_in(key, 1), canvas.shape, 0, V),
            entropies=zeros, confidences=zeros, margins=zeros, noise_level=level,
            next_noise_level=level, keys=jax.random.split(key, draws), vocab_size=V,
            logits=logits,
        )  # fmt: skip
        return sweep.correct(proposal, levels, jnp.broadcast_to(n, (draws,))), None

    first = jax.random.randint(jax.random.key(9), (draws, C), 0, V)
    last, _ = jax.lax.scan(step, first, jnp.arange(90))
    expected = draws * joint.sum(0)
    counts = np.bincount(number(np.asarray(last)), minlength=len(CANVASES))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    before = np.bincount(number(np.asarray(first)), minlength=len(CANVASES))
    assert scipy.stats.chisquare(before, expected).pvalue < 1e-9


class MaskedLanguage(nn.Module):
    """The exact denoiser of the language of its parameters under masked corruption."""

    config: ToyConfig = ToyConfig(vocab_size=V + 1, canvas_length=C, mask_id=V)

    def encode(self, tokens, positions, segment_ids, prefix=None):
        nothing = jnp.zeros((*tokens.shape, 1))
        return nothing, {'values': nothing[:, None]}

    def unembed(self, hidden):
        return jnp.zeros((*hidden.shape[:-1], V + 1))

    def denoise(self, canvas, starts, segment_ids, prefix, soft_embeddings=None):
        logits = self.variables['params']['table']
        return logits[canvas @ ((V + 1) ** np.arange(C)[::-1])]

    def soft_embed(self, logits):
        return jnp.zeros((*logits.shape[:-1], 1))


def masked_language(seed):
    """Returns the parameters of `MaskedLanguage`: [canvases with masks, C, V + 1] logits."""
    noisy = np.array(list(itertools.product(range(V + 1), repeat=C)))
    agrees = np.all((noisy[None] == V) | (noisy[None] == CANVASES[:, None]), axis=-1)
    with np.errstate(divide='ignore', invalid='ignore'):
        table = denoised(language(seed)[:, None] * agrees)
    table = np.pad(np.maximum(np.nan_to_num(table), -1e9), [(0, 0), (0, 0), (0, 1)])
    return {'table': jnp.asarray(table, jnp.float32)}


def greedy(model, rule, steps, controls=None, seed=0):
    config = SamplingConfig(
        max_new_tokens=C, stop_ids=(), temperature=0.0, acceptance=rule, stopping=Never(),
        max_denoising_steps=steps,
    )  # fmt: skip
    arguments = (masked_language(seed), np.zeros((1, 1), int), np.ones(1, int))
    return Sampler(model, config)(*arguments, rng=jax.random.key(0), controls=controls)


def test_tokens_that_are_taken_back_never_come_back_worse():
    """With the exact denoiser, a token that is predicted again is the most likely given the others,
    so the text never becomes less likely, and in some languages more likely."""
    gains = []
    for seed in range(12):
        plain, revised = (
            greedy(MaskedLanguage(), rule, 3 * C, seed=seed)
            for rule in (TopK(C), Remask(TopK(C), count=1))
        )
        assert int(plain.denoising_steps[0]) == 1 and int(revised.denoising_steps[0]) == 3 * C
        before, after = (language(seed)[number(np.asarray(o.tokens[0]))] for o in (plain, revised))
        gains.append(after - before)
    assert min(gains) >= 0 and max(gains) > 0.05


def test_a_full_canvas_loses_the_tokens_that_were_settled_with_the_least_confidence():
    rule = Remask(TopK(4), count=2)
    mask = jnp.full((1, 4), 9)
    state = rule.first_state(mask)
    first = proposal_of(
        mask, jnp.zeros((1, 4, V)), noise=mask, vocab_size=None,
        candidates=jnp.array([[1, 2, 0, 1]]), confidences=jnp.array([[0.6, 0.9, 0.3, 0.8]]),
    )  # fmt: skip
    canvas, state = rule.next_canvas(first, state)
    assert canvas.tolist() == [[9, 2, 9, 1]]
    # Both are settled again, the first with more confidence, so now others are the least certain.
    is_open = canvas == 9
    second = first.replace(
        canvas=canvas, open=is_open, confidences=jnp.array([[0.95, 1.0, 0.4, 1.0]]),
        candidates=jnp.array([[2, 2, 2, 2]]),
    )  # fmt: skip
    canvas, state = rule.next_canvas(second, state)
    assert canvas.tolist() == [[2, 2, 9, 9]]
    np.testing.assert_allclose(state.confidences, [[0.95, 0.9, 0.4, 0.8]], rtol=1e-6)
    # The last step does not mask any token.
    last = second.replace(next_noise_level=jnp.float32(0.0))
    canvas, _ = rule.next_canvas(last, state)
    assert canvas.tolist() == [[2, 2, 2, 1]]
    # While a position is masked, no settled token is masked again.
    waits = Remask(TopK(1), count=4)
    canvas, _ = waits.next_canvas(first, waits.first_state(mask))
    assert canvas.tolist() == [[9, 2, 9, 9]]


def test_pinned_tokens_are_not_taken_back():
    controls = Controls(pinned=pin([[None, 1]]))
    model = MaskedLanguage()
    output = greedy(model, Remask(TopK(C), count=C), 7, controls)
    assert output.tokens[0, 1] == 1 and int(output.denoising_steps[0]) == 7
    rule = Remask(TopK(4), count=4)
    mask = jnp.full((1, 4), 9)
    proposal = proposal_of(
        mask, jnp.zeros((1, 4, V)), noise=mask, vocab_size=None,
        candidates=jnp.ones((1, 4), jnp.int32), pinned=jnp.array([[True, False, False, True]]),
    )  # fmt: skip
    assert rule.next_canvas(proposal, rule.first_state(mask))[0].tolist() == [[1, 9, 9, 1]]


@pytest.mark.parametrize(
    'model, rule, message',
    [
        (MaskedLanguage(), GibbsSweep(), 'GibbsSweep is for uniform noise'),
        (MaskedLanguage(ToyConfig(V + 1, C)), Remask(), 'Remask is for masked diffusion'),
    ],
)
def test_a_rule_for_the_other_kind_of_noise_is_refused_in_one_line(model, rule, message):
    with pytest.raises(ValueError, match=message) as caught:
        greedy(model, rule, 2)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: GibbsSweep(correctors=0), 'correctors and positions must be >= 1, got 0 and 8'),
        (lambda: GibbsSweep(positions=0), 'correctors and positions must be >= 1, got 1 and 0'),
        (lambda: Remask(count=0), 'count must be >= 1 token'),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    'rule',
    [
        GibbsSweep(EntropyBound(0.5), correctors=2, positions=4),
        Remask(TopK(3), count=5),
        GibbsSweep(GibbsSweep(Ancestral(), 1, 2), 1, 3),
    ],
)
def test_they_are_read_from_what_python_prints_of_them(rule):
    assert SamplingConfig(acceptance=repr(rule)).acceptance == rule


@dataclasses.dataclass(frozen=True)
class Counting:
    """A rule that accepts everything and counts its steps."""

    def first_state(self, canvas: jax.Array) -> Any:
        return jnp.zeros(canvas.shape[0], jnp.int32)

    def next_canvas(self, proposal: Proposal, state: Any) -> tuple[jax.Array, Any]:
        return proposal.candidates, state + 1


def canvas_of(config, rows, max_steps=None):
    model, params = toy(4)
    arguments = pad_prompts([[5, 2, 9], [1], [7, 7]][:rows], config.pad_id)
    sampler = Sampler(model, config)
    keys = jax.random.split(jax.random.key(1), 3)[:rows]
    decoder = Decoder.of(sampler, params)
    state = decoder.prefill(*(jnp.asarray(a) for a in arguments), keys)
    task = diffusion.canvas_task(model, state)
    if max_steps is not None:
        task = task.replace(max_steps=jnp.asarray(max_steps[:rows], jnp.int32))
    return diffusion.denoise_canvas(model, config, params, state.cache, task)


def test_a_row_that_has_stopped_keeps_the_state_of_its_rule():
    config = SamplingConfig(acceptance=Counting(), stopping=Never(), max_denoising_steps=9)
    canvas = canvas_of(config, 3, max_steps=[2, 5, 9])
    assert canvas.rule_state.tolist() == canvas.steps.tolist() == [2, 5, 9]


def test_a_row_does_not_depend_on_its_neighbors_under_a_rule_with_state():
    config = SamplingConfig(
        acceptance=GibbsSweep(EntropyBound(1.0), positions=2), max_denoising_steps=6,
        stopping=Never(), commits='canvas',
    )  # fmt: skip
    alone, beside = canvas_of(config, 1), canvas_of(config, 3)
    assert alone.canvas[0].tolist() == beside.canvas[0].tolist()
    for own, others in zip(
        *map(jax.tree.leaves, (alone.rule_state, beside.rule_state)), strict=True
    ):
        np.testing.assert_array_equal(own[0], others[0])


def test_a_rule_without_state_carries_none_and_pays_for_nothing_that_it_does_not_read(monkeypatch):
    """Its compiled program equals that of a step without logits for the rule."""
    assert not isinstance(EntropyBound(), StatefulRule) and isinstance(Remask(), StatefulRule)
    canvas = jnp.zeros((1, C), jnp.int32)
    assert first_state(EntropyBound(), canvas) is None
    offered = proposal_of(canvas, jnp.zeros((1, C, V)))
    assert next_canvas(EntropyBound(), offered, None)[1] is None

    def operations(config):
        """Returns the number of each operation in the compiled program."""
        jax.clear_caches()
        text = jax.jit(lambda: canvas_of(config, 2)).lower().compile().as_text()
        return collections.Counter(re.findall(r'= \S+ ([a-z-]+)\(', text))

    config = SamplingConfig(max_denoising_steps=5)
    assert canvas_of(config, 2).rule_state is None
    counts, propose = [], diffusion._propose
    for fields in ({}, {'logits': None, 'pinned': None, 'greedy': None, 'temperature': None}):

        def offer(*arguments, fields=fields):
            proposal, *others = propose(*arguments)
            return proposal.replace(**fields), *others

        monkeypatch.setattr(diffusion, '_propose', offer)
        counts.append(operations(config))
    assert counts[0] == counts[1] and counts[0].total() > 500
