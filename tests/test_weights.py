"""Tests that every parameter of all models is declared once, with its axes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from new_params import new_params

from diffusiongemma.models import DenoiserConfig, DiffusionGemma, LightConfig
from diffusiongemma.models.inference import with_execution
from diffusiongemma.models.transformer import init_boxed_params, init_params
from diffusiongemma.models.weights import WEIGHTS, map_kernels, weight_at
from diffusiongemma.parallel import LOGICAL_AXIS_RULES, make_mesh, on_mesh, param_shardings
from diffusiongemma.parallel.sharding import rules_with

STACKED = ('layers', 'shared_layers')
TINY = ('tiny_config', 'tiny_moe_config', 'tiny_e2b_config', 'tiny_gemma3_config')
LIGHT = LightConfig(layers=(0,), teacher_state=True, draft_vocab_size=11, serial_rank=4)


@pytest.fixture(scope='module')
def models(request):
    """Returns denoisers of each family, which contain an autoregressive model, and each kind."""
    shared, separate = (
        DenoiserConfig(canvas_length=4, kind=kind) for kind in ('shared', 'separate')
    )
    light = DenoiserConfig(canvas_length=4, kind='light', light=LIGHT, self_conditioning=False)
    kinds = dict.fromkeys(TINY, (shared,)) | {'tiny_e2b_config': (shared, separate, light)}
    return [
        DiffusionGemma(request.getfixturevalue(name).replace(denoiser=denoiser))
        for name, denoisers in kinds.items()
        for denoiser in denoisers
    ]


@functools.cache  # tracing a model takes a second
def boxed(model):
    """Returns the shape and axis names of every weight by its path."""
    shapes = jax.eval_shape(lambda key: init_boxed_params(model, key), jax.random.key(0))
    return {path: box for path, box in flatten_dict(shapes).items() if path[-1] != 'draft_ids'}


def test_every_parameter_has_its_declared_axes(models):
    used = set()
    for model in models:
        for path, parameter in boxed(model).items():
            declared = weight_at(path)
            assert declared is not None, path
            stacked = any(part in STACKED for part in path)
            assert parameter.names == ('layers',) * stacked + declared.axes, path
            used.add(id(declared))
    unused = {name for name, weight in WEIGHTS.items() if id(weight) not in used}
    assert unused == {'norm/scale', 'draft_head'}  # of norms outside of a model, of sampling


def test_every_axis_has_a_place_on_the_mesh():
    axes = {axis for weight in WEIGHTS.values() for axis in weight.axes}
    assert axes <= set(dict(LOGICAL_AXIS_RULES))


def test_large_kernels_can_have_their_outputs_in_front(models):
    for model in models:
        turned = boxed(with_execution(model, output_major=True))
        for path, parameter in boxed(model).items():
            weight = weight_at(path)
            names = weight.outputs_first(weight.axes) if weight.large else weight.axes
            stacked = parameter.names[: -len(names) or None] if names else parameter.names
            assert turned[path].names == (*stacked, *names), path
            assert sorted(turned[path].value.shape) == sorted(parameter.value.shape)


def test_a_change_of_kernels_leaves_everything_else_alone(models):
    for model in models:
        params = unflatten_dict(boxed(model))
        changed = flatten_dict(map_kernels(lambda kernel, weight: 'changed', params))
        for path in boxed(model):
            kernel = path[-2] in ('attention', 'mlp', 'experts')
            assert (changed[path] == 'changed') == kernel, path


def test_one_row_of_the_table_moves_one_kind_of_weight(tiny_config):
    mesh = make_mesh({'fsdp': 2, 'sequence': 4})
    rules = rules_with({'mlp_embed': ('sequence',)})
    before = flatten_dict(param_shardings(on_mesh(DiffusionGemma(tiny_config), mesh), mesh))
    after = flatten_dict(param_shardings(on_mesh(DiffusionGemma(tiny_config), mesh, rules), mesh))
    moved = {path[-2:] for path in before if before[path] != after[path]}
    assert moved == {('mlp', 'gate'), ('mlp', 'up'), ('mlp', 'down')}


def test_a_row_of_the_width_is_for_every_axis_of_the_width_that_is_not_named():
    rules = dict(rules_with({'embed': ('data',), 'o_embed': ()}))
    assert rules['qkv_embed'] == rules['expert_embed'] == rules['embed'] == ('data',)
    assert rules['o_embed'] == ()


def test_a_declaration_is_of_axes_in_the_order_of_the_array():
    output = WEIGHTS['attention/output']
    assert output.axes == ('heads', 'head_dim', 'o_embed')
    assert output.outputs_first('abc') == ('c', 'a', 'b')
    down = WEIGHTS['experts/down']
    assert dataclasses.astuple(down)[:3] == (('expert_embed',), ('expert_mlp',), ('experts',))
    assert down.outputs_first('edf') == ('e', 'f', 'd')


@pytest.mark.slow
def test_the_parameters_of_tests_are_those_of_a_new_model(tiny_e2b_config, tiny_moe_config):
    everything = tiny_e2b_config.replace(
        layer_types=('sliding', 'full') * 2,
        num_kv_shared_layers=2,
        moe=tiny_moe_config.moe,
        query_scale=0.5,
        norm_scale_offset=1.0,
        denoiser=DenoiserConfig(canvas_length=4, kind='light', light=LIGHT),
    )
    model = DiffusionGemma(everything)
    expected = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    expected, found = flatten_dict(jax.device_get(expected)), flatten_dict(new_params(model))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        other, name = np.asarray(found[path]), '/'.join(path)
        assert other.shape == value.shape and other.dtype == value.dtype, name
        if np.ptp(value) == 0 or path[-1] == 'draft_ids':
            np.testing.assert_array_equal(other, value, err_msg=name)
        else:  # within ten standard errors
            rtol = 10 / np.sqrt(2 * value.size)
            np.testing.assert_allclose(other.std(), value.std(), rtol=rtol, err_msg=name)
            assert abs(other.mean()) < 10 * value.std() / np.sqrt(value.size), name
