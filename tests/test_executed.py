"""Tests the FLOPs, memory and lower bounds of compiled programs of known sizes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusiongemma.accounting.executed import executed_flops
from diffusiongemma.accounting.flops import count_flops
from diffusiongemma.accounting.hlo import Program
from diffusiongemma.accounting.liveness import peak_bytes
from diffusiongemma.models import Gemma, MoEConfig
from diffusiongemma.models.kernels.grouped import grouped_matmul
from diffusiongemma.models.presets import GEMMA3_270M, GEMMA4_E2B
from diffusiongemma.parallel import make_mesh, on_mesh, param_shardings
from diffusiongemma.planning.needed import Tokens, of_pass, of_update
from diffusiongemma.planning.programs import abstract_params, cut_to

MATMUL = """
%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,4]{1,0} constant({...})
  %y = f32[8,4]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%cheap (a: f32[8,16]) -> f32[8,8] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%nothing
}

%costly (a: f32[8,16]) -> f32[8,8] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a: f32[8,16]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %l = f32[3,8,16]{2,1,0} parameter(1)
  %r = f32[3,16,4]{2,1,0} parameter(2)
  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%condition, body=%body
  %chosen = f32[8,8]{1,0} conditional(%i, %a, %a), branch_computations={%cheap, %costly}
  %batched = f32[3,8,4]{2,1,0} convolution(%l, %r), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  %padded = f32[1,6,4]{2,1,0} convolution(%i1, %i2), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
  %i1 = f32[1,6,16]{2,1,0} parameter(3)
  %i2 = f32[3,16,4]{2,1,0} parameter(4)
  %n = s32[] parameter(5)
  %offsets = s32[5]{0} parameter(6)
  %groups = s32[7]{0} parameter(7)
  %tiles = s32[7]{0} parameter(8)
  ROOT %k = f32[8,4]{1,0} custom-call(%n, %offsets, %groups, %tiles, %a), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"4000"}}
}
"""  # noqa: E501


def test_loops_branches_batches_padding_and_kernels_count_what_they_execute():
    loop, branch = 5 * 2 * 8 * 4 * 16, 2 * 8 * 8 * 16
    # At each position over a dilated batch, the window of 3 meets one element.
    batched = 2 * 3 * 8 * 4 * 16
    padded = 2 * 4 * 16 * (3 * 6 - 2)  # two positions of the window meet the padding
    assert executed_flops(Program(MATMUL)) == loop + branch + batched + padded + 4000
    # Seven visits of 4 groups are four tiles, and three more for tiles with rows of two groups.
    tiles = executed_flops(Program(MATMUL), whole_tiles=True)
    assert tiles == loop + branch + batched + padded + 4000 * 7 / 4


def test_a_compiled_program_executes_what_is_counted_from_its_trace():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((8, 16), 'float32'), jax.ShapeDtypeStruct((5, 16, 16), 'float32')
    text = jax.jit(function).lower(*shapes).compile().as_text()
    assert count_flops(function, *shapes).model == 5 * 2 * 8 * 16 * 16
    if ' dot(' in text:  # the compiler may call a library instead
        assert executed_flops(Program(text)) == 5 * 2 * 8 * 16 * 16


def test_each_row_of_a_grouped_matmul_counts_once_whatever_a_platform_does():
    x, kernels = (jax.ShapeDtypeStruct(shape, 'float32') for shape in ((64, 128), (4, 128, 256)))
    sizes = jax.ShapeDtypeStruct((4,), 'int32')
    forward = 2 * 64 * 128 * 256
    assert count_flops(grouped_matmul, x, kernels, sizes).model == forward
    loss = lambda *arguments: jnp.sum(grouped_matmul(*arguments))  # noqa: E731
    assert count_flops(jax.grad(loss, (0, 1)), x, kernels, sizes).model == 3 * forward


SCHEDULE = """
%body (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %one = f32[4]{0} convert(%x)
  %two = f32[4]{0} convert(%one)
  %y = f32[4]{0} custom-call(%one, %two)
  ROOT %t = (f32[4]{0}) tuple(%y)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} convert(%a)
  %v = f32[2,2]{1,0} bitcast(%b)
  %c = f32[2,2]{1,0} fusion(%v), kind=kLoop, calls=%f
  %init = (f32[4]{0}) tuple(%c)
  %w = (f32[4]{0}) while(%init), condition=%none, body=%body
  %g = f32[4]{0} get-tuple-element(%w), index=0
  %small = f32[1]{0} convert(%g)
  ROOT %r = f32[4]{0} add(%g, %a)
}
"""


def test_buffers_count_from_their_making_to_their_last_use():
    def counts(shape):
        return 16.0 if '[4]' in shape or '[2,2]' in shape else 0.0

    # %c reuses the buffer of %b. The loop has that of its argument, and two more.
    assert peak_bytes(Program(SCHEDULE), counts) == 3 * 16


def test_a_pass_needs_each_weight_once_and_experts_as_far_as_tokens_reach(tiny_config):
    moe = MoEConfig(num_experts=8, top_k=2, expert_width=16)
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    model = on_mesh(Gemma(tiny_config.autoregressive.replace(moe=moe)), mesh)
    params = abstract_params(model, mesh, jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shard = sum(_size(leaf) for _, leaf in leaves)
    whole = sum(_size(leaf) * (4 if 'fsdp' in str(leaf.sharding.spec) else 1) for _, leaf in leaves)
    experts = sum(
        _size(leaf) * (4 if 'fsdp' in str(leaf.sharding.spec) else 1)
        for path, leaf in leaves
        if "'experts'" in str(path)
    )

    def needed(rows, passed):
        return of_pass(model, params, mesh, rows, Tokens(passed, 0, 7.0), denoises=False)

    everywhere = needed(('fsdp',), 4000)
    assert everywhere.hbm == pytest.approx(4 * whole + 7)
    # The bytes of a device's tokens, which are summed over two devices three times in each layer.
    tokens = 1000 * tiny_config.width * 4
    assert everywhere.sent == 4 * (whole - shard) + tiny_config.num_layers * 3 * tokens
    one_token = needed(('fsdp',), 4)
    assert one_token.hbm == pytest.approx(4 * (whole - experts * (1 - 2 / 8)) + 7)


def test_an_update_reads_and_writes_the_state_and_scatters_gradients():
    mesh = make_mesh({'data': 2, 'fsdp': 4})
    sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
    leaf = jax.ShapeDtypeStruct((8, 10), 'float32', sharding=sharding)
    needed = of_update([leaf], [leaf, leaf], mesh, ('data', 'fsdp'))
    assert needed.hbm == 2 * 2 * 20 * 4
    assert needed.sent == 3 * 80 + 2 * 80 / 2


def test_a_model_is_cut_to_whole_patterns():
    cut = cut_to(GEMMA3_270M, 6)
    assert cut.layer_types == GEMMA3_270M.layer_types[:6] and cut.width == GEMMA3_270M.width
    with pytest.raises(ValueError, match='--layers=7.*18 layers in patterns of 6'):
        cut_to(GEMMA3_270M, 7)
    shared = GEMMA4_E2B.num_kv_shared_layers
    assert cut_to(GEMMA4_E2B, GEMMA4_E2B.num_layers).num_kv_shared_layers == shared
    assert cut_to(GEMMA4_E2B, 5).num_kv_shared_layers == 0
    mesh = make_mesh({'fsdp': 8})
    assert param_shardings(Gemma(cut), mesh)


def _size(leaf):
    """Returns the number of elements of a leaf's shard."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = 1
    for side in shape:
        size *= side
    return size
