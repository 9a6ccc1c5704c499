"""Tests other acceptance rules than the entropy bound, and masked diffusion."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import ToyConfig

from diffusiongemma.sampling import (
    AllOf,
    Ancestral,
    ConfidenceThreshold,
    EntropyBound,
    Margin,
    MeanEntropy,
    Never,
    PromptLookup,
    Proposal,
    Sampler,
    SamplingConfig,
    StableAndConfident,
    TokenStability,
    TopK,
)
from diffusiongemma.sampling.epilogue import keep_top

V, C = 3, 3
CANVASES = np.array(list(itertools.product(range(V), repeat=C)))  # [V^C, C]


def proposal_of(canvas, candidates, noise, **fields):
    canvas, candidates, noise = (jnp.asarray(a, jnp.int32) for a in (canvas, candidates, noise))
    zeros = jnp.zeros(canvas.shape)
    known = {
        'open': jnp.ones(canvas.shape, bool),
        'entropies': zeros,
        'confidences': zeros,
        'margins': zeros,
        'noise_level': jnp.float32(1.0),
        'next_noise_level': jnp.float32(0.5),
        'keys': jax.random.split(jax.random.key(0), canvas.shape[0]),
        'vocab_size': V,
    }
    return Proposal(canvas=canvas, candidates=candidates, noise=noise, **(known | fields))


@st.composite
def open_values(draw):
    """Returns values in [0, 1] of a row of positions, and a mask of open positions."""
    length = draw(st.integers(1, 10))
    values = draw(st.lists(st.floats(0, 1, width=32), min_size=length, max_size=length))
    return np.float32(values), np.array(
        draw(st.lists(st.booleans(), min_size=length, max_size=length))
    )


@given(open_values(), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_top_k_takes_the_k_most_confident_open_positions(given_values, k):
    values, is_open = given_values
    accepted = np.asarray(TopK(k).accept(jnp.asarray(values), jnp.asarray(is_open)))
    assert accepted.sum() == min(k, is_open.sum()) and not (accepted & ~is_open).any()
    others = is_open & ~accepted
    if others.any():
        assert values[accepted].min() >= values[others].max()


@pytest.mark.parametrize('rule', [ConfidenceThreshold, Margin])
@given(given_values=open_values(), threshold=st.floats(0, 1, width=32))
@settings(max_examples=80, deadline=None)
def test_a_threshold_takes_what_reaches_it_and_the_best_in_any_case(rule, given_values, threshold):
    values, is_open = given_values
    accepted = np.asarray(rule(threshold).accept(jnp.asarray(values), jnp.asarray(is_open)))
    expected = is_open & (values >= threshold)
    if is_open.any() and not expected.any():
        expected[np.argmax(np.where(is_open, values, -1))] = True
    np.testing.assert_array_equal(accepted, expected)


@pytest.mark.parametrize(
    'rule, field',
    [(TopK(1), 'confidences'), (ConfidenceThreshold(0.8), 'confidences'), (Margin(0.8), 'margins')],
    ids=['top-k', 'confidence', 'margin'],
)
def test_rules_read_their_own_statistic_and_leave_settled_positions(rule, field):
    values = {field: jnp.array([[0.9, 0.1, 1.0]])}
    proposal = proposal_of(
        [[0, 0, 0]], [[1, 1, 1]], [[2, 2, 2]], open=jnp.array([[True, True, False]]), **values
    )
    assert rule.next_canvas(proposal).tolist() == [[1, 2, 0]]


def test_the_entropy_bound_reads_entropies():
    entropies = jnp.array([[0.3, 3.0, 0.02]])
    proposal = proposal_of([[0, 0, 0]], [[1, 1, 1]], [[2, 2, 2]], entropies=entropies)
    assert EntropyBound(0.1).next_canvas(proposal).tolist() == [[1, 2, 1]]


@pytest.mark.parametrize(
    'make', [lambda: TopK(0), lambda: Margin(1.2), lambda: ConfidenceThreshold(-1)]
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match='must be >= 1|is a probability'):
        make()


def forward(level, size):
    """Returns the transition matrix [x_0, x_t] of uniform corruption to a level."""
    return (1 - level) * np.eye(size) + level / size


@pytest.mark.parametrize('t, s', [(1.0, 0.75), (0.75, 0.5), (0.25, 0.0)])
def test_ancestral_draws_from_the_reverse_posterior(t, s):
    """The expected q(x_s | x_t, x_0) comes from the forward process by Bayes' rule."""
    draws = 40_000
    between = forward(1 - (1 - t) / (1 - s), V)  # from level s to level t
    for current, clean in itertools.product(range(V), range(V)):
        expected = forward(s, V)[clean] * between[:, current]
        expected = expected / expected.sum()
        noise = jax.random.randint(jax.random.key(1), (draws, 1), 0, V)
        proposal = proposal_of(
            np.full((draws, 1), current),
            np.full((draws, 1), clean),
            noise,
            keys=jax.random.split(jax.random.key(2), draws),
            noise_level=jnp.float32(t),
            next_noise_level=jnp.float32(s),
        )
        drawn = np.bincount(Ancestral().next_canvas(proposal)[:, 0], minlength=V)
        possible = expected > 0
        assert not drawn[~possible].any()
        pvalue = scipy.stats.chisquare(drawn[possible], draws * expected[possible]).pvalue
        assert pvalue > 1e-4 or possible.sum() == 1


def language():
    """Returns probabilities [V^C] of a toy language with dependent positions."""
    weights = np.random.default_rng(0).gamma(0.4, size=len(CANVASES))
    return weights / weights.sum()


def clean_posteriors(likelihoods):
    """Returns [canvases, C, V] p(x_0^i | noisy canvas) from likelihoods [x_0, noisy]."""
    joint = language()[:, None] * likelihoods
    marginals = np.stack([[joint[CANVASES[:, i] == v].sum(0) for v in range(V)] for i in range(C)])
    return np.moveaxis(marginals, -1, 0) / joint.sum(0)[:, None, None]


def assert_is_the_language(samples):
    """Compares draws [N, C] with the language by a chi-square test at 1e-3."""
    counts = np.bincount(np.asarray(samples) @ (V ** np.arange(C)[::-1]), minlength=V**C)
    expected = language() * len(samples)
    common = expected >= 5
    cells = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    assert scipy.stats.chisquare(*cells, sum_check=False).pvalue > 1e-3


@pytest.mark.slow
def test_ancestral_sampling_of_uniform_noise_gives_back_the_language():
    steps, draws = 500, 8_000
    levels = 1 - np.arange(steps + 1) / steps
    tables = []
    for level in levels[:-1]:
        kernel = forward(level, V)
        likelihoods = np.prod(
            [kernel[CANVASES[:, None, i], CANVASES[None, :, i]] for i in range(C)], 0
        )
        tables.append(clean_posteriors(likelihoods))
    tables = jnp.log(jnp.asarray(np.stack(tables), jnp.float32))  # [T, canvases, C, V]

    def step(canvas, inputs):
        table, t, s, key = inputs
        candidate_key, noise_key, rule_key = jax.random.split(key, 3)
        logits = table[canvas @ (V ** jnp.arange(C)[::-1])]
        proposal = proposal_of(
            canvas,
            jax.random.categorical(candidate_key, logits),
            jax.random.randint(noise_key, canvas.shape, 0, V),
            noise_level=t,
            next_noise_level=s,
            keys=jax.random.split(rule_key, draws),
        )
        return Ancestral().next_canvas(proposal), None

    first_key, loop_key = jax.random.split(jax.random.key(4))
    canvas = jax.random.randint(first_key, (draws, C), 0, V)
    t, s = (jnp.asarray(x, jnp.float32) for x in (levels[:-1], levels[1:]))
    canvas, _ = jax.lax.scan(step, canvas, (tables, t, s, jax.random.split(loop_key, steps)))
    assert_is_the_language(canvas)


class MaskedLanguage(nn.Module):
    """The exact denoiser of the language under masked corruption; V is the mask token."""

    config: ToyConfig = ToyConfig(vocab_size=V + 1, canvas_length=C, mask_id=V)

    def encode(self, tokens, positions, segment_ids, prefix=None):
        nothing = jnp.zeros((*tokens.shape, 1))
        return nothing, {'values': nothing[:, None]}

    def unembed(self, hidden):
        return jnp.zeros((*hidden.shape[:-1], V + 1))

    def denoise(self, canvas, starts, segment_ids, prefix, soft_embeddings=None):
        noisy = np.array(list(itertools.product(range(V + 1), repeat=C)))
        hidden = noisy[None] == V
        likelihoods = np.all(hidden | (noisy[None] == CANVASES[:, None]), axis=-1)
        with np.errstate(divide='ignore', invalid='ignore'):
            table = np.log(clean_posteriors(likelihoods.astype(float)))
        table = np.pad(np.maximum(np.nan_to_num(table), -1e9), [(0, 0), (0, 0), (0, 1)])
        return jnp.asarray(table, jnp.float32)[canvas @ ((V + 1) ** np.arange(C)[::-1])]

    def soft_embed(self, logits):
        return jnp.zeros((*logits.shape[:-1], 1))


@pytest.mark.slow
def test_ancestral_sampling_of_masked_noise_gives_back_the_language():
    draws = 10_000
    config = SamplingConfig.ancestral(max_new_tokens=C, max_denoising_steps=300, stop_ids=())
    tokens, lengths = np.zeros((draws, 1), int), np.ones(draws, int)
    output = Sampler(MaskedLanguage(), config)({}, tokens, lengths, rng=jax.random.key(5))
    assert_is_the_language(output.tokens)


@pytest.mark.parametrize('rule', [TopK(1), ConfidenceThreshold(1.0), EntropyBound(0.0)])
def test_unmasking_one_token_a_step_takes_as_many_steps_as_tokens(rule):
    """It samples the language exactly: each token is drawn given the settled ones."""
    draws = 20_000
    config = SamplingConfig(
        max_new_tokens=C,
        stop_ids=(),
        t_min=1.0,
        t_max=1.0,
        acceptance=rule,
        commits='canvas',
    )
    tokens, lengths = np.zeros((draws, 1), int), np.ones(draws, int)
    output = Sampler(MaskedLanguage(), config)({}, tokens, lengths, rng=jax.random.key(6))
    if isinstance(rule, TopK):
        assert set(output.denoising_steps.tolist()) == {C}
    assert (np.asarray(output.denoising_steps) <= C).all()
    assert np.asarray(output.tokens).max() < V
    if not isinstance(rule, TopK | ConfidenceThreshold):  # these rules read the candidate
        assert_is_the_language(output.tokens)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=9),
    st.integers(1, 9),
    st.floats(0.01, 1),
)
@settings(max_examples=80, deadline=None)
def test_top_k_and_top_p_keep_the_likeliest_tokens(logits, k, p):
    logits = np.float32(logits)
    kept = np.isfinite(np.asarray(keep_top(jnp.asarray(logits)[None], k, p))[0])
    assert kept[np.argmax(logits)]
    assert logits[kept].min() >= logits[~kept].max(initial=-np.inf)
    order = np.argsort(-logits, kind='stable')[:k]
    probs = np.exp(logits[order] - logits.max())
    probs = probs / probs.sum()
    wanted = 1 + int(np.sum(np.cumsum(probs)[:-1] < p - 1e-5))
    assert kept.sum() >= wanted
    distinct = len(set(logits.tolist())) == len(logits)
    if distinct and not np.isclose(np.cumsum(probs), p, atol=1e-5).any():
        assert kept.sum() == wanted


@pytest.mark.parametrize(
    'field, rule',
    [
        ('acceptance', EntropyBound(float('inf'))),
        ('acceptance', TopK(4)),
        ('acceptance', ConfidenceThreshold(0.5)),
        ('acceptance', Margin(0.25)),
        ('acceptance', Ancestral()),
        ('stopping', StableAndConfident(2, 0.01)),
        ('stopping', AllOf((TokenStability(3), MeanEntropy(0.5), Never()))),
        ('drafts', PromptLookup(length=4, max_ngram=2)),
    ],
)
def test_a_rule_is_read_from_what_python_prints_of_it(field, rule):
    assert getattr(SamplingConfig(**{field: repr(rule)}), field) == rule


def test_a_rule_is_read_from_its_name_and_from_numbers_without_names():
    assert SamplingConfig(acceptance=' TopK ').acceptance == TopK()
    assert SamplingConfig(acceptance='TopK(3)').acceptance == TopK(3)
    assert SamplingConfig(stopping='AllOf([MeanEntropy(1), Never()])').stopping == AllOf(
        (MeanEntropy(1), Never())
    )


@pytest.mark.parametrize(
    'values, message',
    [
        ({'acceptance': 'TopP(4)'}, r"acceptance='TopP\(4\)' names no rule; write one of Entropy"),
        ({'acceptance': 'Never()'}, 'names no rule'),
        ({'acceptance': 'TopK(k='}, 'names no rule'),
        ({'acceptance': 'TopK(n=4)'}, 'names no rule'),
        ({'acceptance': "TopK(__import__('os'))"}, 'names no rule'),
        ({'acceptance': 'TopK(0)'}, 'k must be >= 1'),
        ({'acceptance': '4'}, 'has no method next_canvas'),
        ({'acceptance': Never()}, 'has no method next_canvas'),
        ({'stopping': 3}, 'has no method should_stop'),
        (
            {'acceptance': TopK(2), 'entropy_bound': 0.1},
            r'entropy_bound=0.1 has no effect beside acceptance=TopK\(k=2\)',
        ),
        ({'acceptance': EntropyBound(0.2), 'entropy_bound': 0.1}, 'has no effect beside'),
        ({'stopping': Never(), 'stability_threshold': 0}, 'has no effect beside stopping=Never'),
        ({'stopping': MeanEntropy(0.1), 'confidence_threshold': 0.1}, 'has no effect beside'),
    ],
)
def test_what_names_no_rule_or_two_is_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        SamplingConfig(**values)
    assert len(str(caught.value).splitlines()) == 1


def test_a_number_and_the_rule_of_the_same_number_agree():
    config = SamplingConfig(acceptance=EntropyBound(0.2), entropy_bound=0.2)
    assert config.acceptance_rule == EntropyBound(0.2)
    assert SamplingConfig().acceptance_rule == EntropyBound(0.1)
    assert SamplingConfig(stability_threshold=0).stopping_rule == StableAndConfident(0, 0.005)
