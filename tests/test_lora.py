"""Tests low-rank adapters: the passes that they change, training, saving and merging."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from diffusiongemma.checkpoints.adapters import fingerprint, save_adapters
from diffusiongemma.checkpoints.bundle import save_bundle
from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models import DiffusionGemma, Gemma, lora
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.lora import LoraConfig, adapter_shardings, base_params
from diffusiongemma.parallel import make_mesh, param_shardings

init_lora = jax.jit(lora.init_lora, static_argnums=0)
merge_lora = jax.jit(lora.merge_lora, static_argnums=2)
DATA = Path(__file__).parent / 'data'
TOKENS = np.arange(12).reshape(2, 6)
CANVAS = np.arange(8).reshape(2, 4)
BOTH = LoraConfig(rank=2, alpha=3.0, passes='both', whole=())
DENOISE = dataclasses.replace(BOTH, passes='denoise')


def random_params(model, seed=0):
    """Returns nontrivial parameters; numpy creates them, which needs no compilation."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name, shape in param_shapes(model).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        center = 1.0 if name.endswith(('scale', 'scalar')) else 0.0
        flat[name] = jnp.asarray(center + 0.2 * noise)
    return unflatten_dict(flat, sep='/')


def trained_adapters(settings, params):
    """Returns adapters in which no factor is zero."""
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(lambda: lora.init_lora(settings, params, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes
    )


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def passes(config, params):
    """Returns the encode logits, and the denoise logits of a canvas after the tokens."""
    model = DiffusionGemma(config)

    @jax.jit
    def run(params):
        def apply(*args, method):
            return model.apply({'params': params}, *args, method=method)

        ones = jnp.ones_like(TOKENS)
        positions = jnp.broadcast_to(jnp.arange(6), TOKENS.shape)
        hidden, kv = apply(TOKENS, positions, ones, method='encode')
        starts, prefix = jnp.full((2, 1), 6), Prefix(kv, positions, ones)
        denoised = apply(CANVAS[:, None], starts, ones[:, :1], prefix, method='denoise')
        return apply(hidden, method='unembed'), denoised[:, 0]

    return run(params)


@pytest.fixture
def config(tiny_moe_config):
    """Returns a config with two scanned layers of one kind, with experts."""
    return tiny_moe_config.replace(layer_types=('full', 'full'))


@pytest.fixture
def params(config):
    return random_params(DiffusionGemma(config))


def test_adapters_start_without_any_effect(params):
    adapters = init_lora(BOTH, params, jax.random.key(1))
    assert_trees_equal(merge_lora(params, adapters, BOTH), params)


def test_layers_and_experts_have_factors_of_their_own(config):
    config = config.replace(layer_types=('sliding', 'full', 'sliding', 'full', 'sliding'))
    params = random_params(DiffusionGemma(config))
    key = jax.random.key(1)
    adapters = jax.eval_shape(lambda: lora.init_lora(BOTH, params, key))
    adapters = flatten_dict(adapters, sep='/')
    shapes = {name: value.shape for name, value in adapters.items()}
    layer = 'backbone/layers/layer_0'
    assert shapes[f'{layer}/attention/query/lora_a'] == (2, 32, 2)  # G, D, r
    assert shapes[f'{layer}/attention/query/lora_b'] == (2, 2, 32)  # G, r, N * H
    assert shapes[f'{layer}/attention/output/lora_a'] == (2, 32, 2)  # G, N * H, r
    assert shapes[f'{layer}/moe/experts/down/lora_a'] == (2, 4, 16, 2)  # G, E, F, r
    assert shapes[f'{layer}/moe/experts/down/lora_b'] == (2, 4, 2, 32)  # G, E, r, D
    assert shapes['backbone/tail/layer_0/moe/experts/up/lora_a'] == (4, 32, 2)  # E, D, r
    assert shapes['self_conditioning/mlp/up/lora_b'] == (2, 48)  # r, F
    assert not any('norm' in name or 'router' in name or 'embed' in name for name in shapes)


@pytest.mark.parametrize(
    ('path', 'equation'),
    [
        ('attention/query', 'td,gdnh->gtnh'),
        ('attention/output', 'tnh,gnhd->gtd'),
        ('mlp/down', 'tf,gfd->gtd'),
        ('moe/experts/up', 'td,gedf->getf'),
    ],
)
def test_a_merged_kernel_gives_what_the_two_factors_add(params, path, equation):
    adapters = trained_adapters(BOTH, params)
    merged = merge_lora(params, adapters, BOTH)
    name = f'backbone/layers/layer_0/{path}'
    kernel, new = (flatten_dict(tree, sep='/')[name] for tree in (params, merged))
    flat = flatten_dict(adapters, sep='/')
    a, b = flat[f'{name}/lora_a'], flat[f'{name}/lora_b']
    inputs = equation.split(',')[0]
    sizes = {'t': 3} | dict(zip(equation.split(',')[1].split('->')[0], kernel.shape, strict=True))
    x = jax.random.normal(jax.random.key(3), [sizes[letter] for letter in inputs])
    rows = x.reshape(3, -1)  # [t, in]
    low_rank = jnp.einsum('ti,...ir->...tr', rows, a)
    added = BOTH.alpha / BOTH.rank * jnp.einsum('...tr,...ro->...to', low_rank, b)
    expected = jnp.einsum(equation, x, kernel)
    np.testing.assert_allclose(
        jnp.einsum(equation, x, new), expected + added.reshape(expected.shape), atol=1e-4
    )


@pytest.mark.slow
def test_adapters_of_the_denoise_pass_leave_the_encode_pass_as_it_is_to_the_bit(config, params):
    target = config.replace(kind='separate')
    base = base_params(target, params)
    adapters = init_lora(DENOISE, base, jax.random.key(1))
    encoded, denoised = passes(config, params)
    same, started = passes(target, merge_lora(base, adapters, DENOISE))
    np.testing.assert_array_equal(same, encoded)
    np.testing.assert_allclose(started, denoised, atol=1e-5)
    same, moved = passes(target, merge_lora(base, trained_adapters(DENOISE, base), DENOISE))
    np.testing.assert_array_equal(same, encoded)
    assert float(jnp.max(jnp.abs(moved - denoised))) > 0.1


@pytest.mark.slow
def test_gradients_reach_adapters_of_every_kernel(config, params):
    adapters = init_lora(BOTH, params, jax.random.key(1))

    def loss(adapters):
        merged = merge_lora(params, adapters, BOTH)
        logits = DiffusionGemma(config).apply({'params': merged}, CANVAS)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

    grads = flatten_dict(jax.jit(jax.grad(loss))(adapters), sep='/')
    moved = {name for name, value in grads.items() if float(jnp.max(jnp.abs(value))) > 0}
    # B is zero, so A has no gradient yet, and a first step has no self-conditioning input.
    wanted = {name for name in grads if name.endswith('lora_b')}
    assert moved == {name for name in wanted if 'self_conditioning' not in name}


def test_an_autoregressive_base_is_adapted_with_self_conditioning_trained_whole(config):
    teacher = Gemma(config.autoregressive)
    teacher_params = random_params(teacher, 2)
    target = config.replace(kind='separate')
    fresh = random_params(DiffusionGemma(target), 3)
    settings = LoraConfig(rank=2)
    adapters = init_lora(settings, fresh, jax.random.key(1))
    assert 'up' in adapters['self_conditioning']['mlp']
    merged = merge_lora(base_params(target, teacher_params), adapters, settings)
    assert jax.tree.structure(merged) == jax.tree.structure(fresh)
    assert_trees_equal(merged['denoise_backbone'], teacher_params['backbone'])
    assert_trees_equal(merged['backbone'], teacher_params['backbone'])


def test_factors_lie_on_the_mesh_as_their_kernels_do(config, params):
    mesh = make_mesh({'fsdp': 2, 'tensor': 2, 'expert': 2})
    model = DiffusionGemma(config)
    adapters = init_lora(BOTH, params, jax.random.key(1))
    shardings = adapter_shardings(adapters, param_shardings(model, mesh))
    placed = jax.device_put(adapters, shardings)
    experts = placed['backbone']['layers']['layer_0']['moe']['experts']['up']
    assert tuple(experts['lora_a'].sharding.spec) == (None, 'expert', 'fsdp', None)
    assert tuple(experts['lora_b'].sharding.spec) == (None, 'expert', None, 'tensor')


@pytest.fixture
def base(tmp_path, config, params):
    save_bundle(tmp_path / 'base', config, params, Tokenizer.load('builtin'))
    return tmp_path / 'base'


@pytest.mark.parametrize('settings', [pytest.param(BOTH, marks=pytest.mark.slow), DENOISE])
def test_adapters_come_back_from_disk_merged_into_their_base(
    tmp_path, base, config, params, settings
):
    target = config.replace(kind='separate' if settings.passes == 'denoise' else 'shared')
    start = base_params(target, params)
    adapters = trained_adapters(settings, start)
    directory = tmp_path / 'adapters'
    save_adapters(
        directory, settings, adapters, target, base='../base', base_fingerprint=fingerprint(params)
    )
    weights = load_file(directory / 'adapter.safetensors')
    assert all(name.endswith(('lora_a', 'lora_b')) for name in weights)  # nothing of the base
    model, loaded, tokenizer = load_model(directory)
    assert model.config == target and tokenizer is not None
    assert_trees_equal(loaded, merge_lora(start, adapters, settings))
    spread = load_model(directory, jnp.float32, make_mesh({'fsdp': 8}))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread, loaded)


def test_adapters_without_their_base_or_with_another_say_so(tmp_path, base, config, params):
    adapters = init_lora(BOTH, params, jax.random.key(1))

    def save(base, base_fingerprint):
        save_adapters(
            tmp_path / 'a', BOTH, adapters, config, base=base, base_fingerprint=base_fingerprint
        )

    save('../gone', fingerprint(params))
    with pytest.raises(FileNotFoundError, match='gone, which does not exist; change "base" in'):
        load_model(tmp_path / 'a')
    save(str(base), 'another')
    with pytest.raises(ValueError, match='its weights are of another model'):
        load_model(tmp_path / 'a')
    save('builtin-teacher', fingerprint(load_model('builtin-teacher')[1]))
    with pytest.raises(ValueError, match='they are for another base'):
        load_model(tmp_path / 'a')


@pytest.mark.slow
def test_export_writes_the_merged_weights(tmp_path):
    settings = dataclasses.replace(BOTH, targets=('*/attention/key', '*/moe/experts/down'))
    model, params, _ = load_model(DATA / 'tiny_heldout')
    adapters = trained_adapters(settings, params)
    save_adapters(
        tmp_path / 'a', settings, adapters, model.config,
        base=str(DATA / 'tiny_heldout'), base_fingerprint=fingerprint(params),
    )  # fmt: skip
    convert(tmp_path / 'a', tmp_path / 'out', 'hf')
    merged = merge_lora(params, adapters, settings)
    assert_trees_equal(load_model(tmp_path / 'out')[1], merged)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'rank': 0}, 'rank must be >= 1'),
        ({'alpha': 0.0}, 'alpha must be > 0'),
        ({'passes': 'encode'}, "passes must be 'both' or 'denoise'"),
    ],
)
def test_wrong_settings_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_targets_that_match_no_kernel_and_a_pass_that_has_no_layers_are_errors(params):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match='no kernel matches the targets'):
        init_lora(dataclasses.replace(BOTH, targets=('*/atention/*',)), params, key)
    with pytest.raises(ValueError, match='separate denoiser; make its parameters with'):
        init_lora(DENOISE, params, key)


def test_an_adapter_file_of_another_format_is_named(tmp_path):
    (tmp_path / 'adapter.json').write_text(json.dumps({'format': 'peft'}))
    with pytest.raises(ValueError, match="adapter.json: format 'peft'"):
        load_model(tmp_path)
