"""Tests the grouped matmul of routed experts on CPUs and, interpreted, on accelerators."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiongemma.models.expert_parallel import grouped_mlps
from diffusiongemma.models.kernels import grouped, grouped_gpu, grouped_tpu
from diffusiongemma.models.kernels.grouped import grouped_matmul, mlps_by_blocks

ROWS, WIDTH, OUT = 24, 5, 7


def drawn(num_groups, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((ROWS, WIDTH), (num_groups, WIDTH, OUT), (ROWS, OUT))
    return tuple(jax.random.normal(*pair, dtype) for pair in zip(keys, shapes, strict=True))


def row_by_row(x, kernels, sizes):
    """Multiplies each row by its own kernel; rows of no group give zeros."""
    last = jnp.cumsum(sizes)
    group = jnp.searchsorted(last, jnp.arange(len(x)), side='right')
    products = jnp.einsum('nd,ndf->nf', x, kernels[jnp.minimum(group, len(kernels) - 1)])
    return jnp.where((group < len(kernels))[:, None], products, 0)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(product, x, kernels, sizes, weights):
    def weighted(x, kernels):
        out = product(x, kernels, sizes)
        return jnp.vdot(out, weights), out

    return jax.value_and_grad(weighted, (0, 1), has_aux=True)(x, kernels)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4))
def test_each_row_meets_the_kernel_of_its_group_and_rows_of_no_group_are_zero(sizes):
    x, kernels, weights = drawn(4)

    args = (x, kernels, jnp.array(sizes, jnp.int32), weights)
    (_, found), found_gradients = with_gradients(grouped_matmul, *args)
    (_, expected), gradients = with_gradients(row_by_row, *args)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize('num_groups', [1, 3, 64])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_both_routes_give_the_same(num_groups, dtype):
    x, kernels, weights = drawn(num_groups, dtype)
    chosen = jax.random.randint(jax.random.key(1), (ROWS,), 0, num_groups)
    sizes = jnp.bincount(chosen, length=num_groups).astype(jnp.int32)
    tolerance = {'atol': 1e-5} if dtype == jnp.float32 else {'atol': 1e-2, 'rtol': 1e-2}
    for ours, theirs, other in (
        (grouped._by_blocks, grouped._ragged, kernels),
        (grouped._outer_by_blocks, grouped._ragged_outer, weights),
    ):
        found, expected = ours(x, other, sizes), theirs(x, other, sizes)
        assert found.dtype == expected.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, **tolerance)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS), st.sampled_from([3, ROWS]))
def test_whole_mlps_by_blocks_are_those_by_three_products(experts, num_pairs):
    experts = experts[:num_pairs]
    keys = jax.random.split(jax.random.key(0), 4)
    gate, up = (jax.random.normal(key, (4, WIDTH, OUT)) for key in keys[:2])
    down = jax.random.normal(keys[2], (4, OUT, WIDTH))
    x = jax.random.normal(keys[3], (len(experts), WIDTH))
    token = jnp.arange(len(experts), dtype=jnp.int32)[::-1]
    expert = jnp.array(experts, jnp.int32)
    expected = jax.jit(grouped_mlps)(x, token, expert, (gate, up, down))
    turned = tuple(kernel.swapaxes(1, 2) for kernel in (gate, up, down))
    found = jax.jit(mlps_by_blocks)(x, token, expert, turned)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('sizes', [(0, 40, 0, 56), (3, 0, 5, 0), (24, 24, 24, 24)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_kernel_for_gpus_gives_the_same(sizes, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (96, 128), dtype)
    kernels = jax.random.normal(keys[1], (4, 128, 192), dtype)
    group_sizes, rows = jnp.array(sizes, jnp.int32), sum(sizes)
    assert grouped_gpu.fits(x, kernels)
    found = grouped_gpu.grouped_matmul_gpu(x, kernels, group_sizes, interpret=True)
    expected = grouped._ragged(x, kernels, group_sizes)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[:rows], expected[:rows], atol=1e-4)
    y = jax.random.normal(keys[1], (96, 192), dtype)
    found = grouped_gpu.grouped_outer_gpu(x, y, group_sizes, interpret=True)
    np.testing.assert_allclose(found, grouped._ragged_outer(x, y, group_sizes), atol=1e-4)


@pytest.mark.parametrize(
    ('sizes', 'widths'),
    [
        ((0, 100, 0, 60), (128, 72)),
        ((128, 128, 16, 24), (72, 128)),
        pytest.param((0, 100, 0, 60), (72, 128), marks=pytest.mark.slow),
        pytest.param((128, 128, 16, 24), (128, 72), marks=pytest.mark.slow),
    ],
)
def test_the_kernels_of_tpus_give_the_same_forward_and_for_both_gradients(
    sizes, widths, monkeypatch
):
    keys = jax.random.split(jax.random.key(0), 3)
    rows, group_sizes = sum((128, 128, 16, 24)), jnp.array(sizes, jnp.int32)
    x = jax.random.normal(keys[0], (rows, widths[0]))
    kernels = jax.random.normal(keys[1], (4, *widths)) / widths[0] ** 0.5
    inside = jnp.arange(rows) < sum(sizes)
    weights = jax.random.normal(keys[2], (rows, widths[1])) / rows**0.5
    assert grouped.runs_kernel(x, kernels, 'tpu')

    def masked(x, kernels, sizes):  # because rows of no group may contain anything
        return jnp.where(inside[:, None], grouped_matmul(x, kernels, sizes), 0)

    _, expected = with_gradients(masked, x, kernels, group_sizes, weights)
    on_tpu = {
        '_multiply': grouped_tpu.grouped_matmul_tpu,
        '_outer': grouped_tpu.grouped_outer_tpu,
    }
    for name, kernel in on_tpu.items():
        monkeypatch.setattr(grouped, name, functools.partial(kernel, interpret=True))
    out = grouped_matmul(x, kernels, group_sizes)
    np.testing.assert_allclose(out[inside], row_by_row(x, kernels, group_sizes)[inside], atol=1e-5)
    _, found = with_gradients(lambda *args: masked(*args), x, kernels, group_sizes, weights)
    np.testing.assert_allclose(found[0][inside], expected[0][inside], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize(
    ('platform', 'width', 'multiple'),
    [('tpu', 12, 8), ('cuda', 96, 64), ('tpu', 16, 0), ('cuda', 128, 0), ('cpu', 7, 0)],
)
def test_a_fallback_says_that_it_is_one(platform, width, multiple, caplog):
    rows = jax.ShapeDtypeStruct((32, 128), jnp.float32)
    kernels = jax.ShapeDtypeStruct((4, 128, width), jnp.float32)
    grouped.warn_of_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger='absl'):
        for _ in range(2):
            grouped.warn_of_fallback(rows, kernels, platform)
    assert len(caplog.messages) == bool(multiple)
    if multiple:
        assert 'ragged_dot is the fallback' in caplog.text and f'of {multiple}.' in caplog.text


def test_gpus_get_the_kernel_where_it_fits():
    # A kernel asks its device for the kind of GPU, and there is no GPU here.
    device = jax.sharding.AbstractDevice('NVIDIA H100', num_cores=132, platform='gpu')
    gpu = jax.sharding.AbstractMesh((), (), abstract_device=device)

    def lowered(width):
        shapes = ((2048, width), (128, width, 704))
        x, kernels = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
        loss = lambda *args: jnp.sum(grouped_matmul(*args))  # noqa: E731
        with jax.sharding.use_abstract_mesh(gpu):
            traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernels, sizes)
            return traced.lower(lowering_platforms=('cuda',)).as_text()

    assert {'grouped_matmul', 'grouped_outer'} <= set(re.findall(r'grouped_\w+', lowered(2816)))
    assert 'triton' not in lowered(2815)
