"""Tests compilation for TPU slices without devices, and the analysis of compiled HLO."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusiongemma.accounting.devices import figures_of
from diffusiongemma.accounting.executed import executed_flops
from diffusiongemma.accounting.flops import count_flops
from diffusiongemma.accounting.hlo import Collective, Program
from diffusiongemma.models import DiffusionGemma, MoEConfig
from diffusiongemma.models.cache import KVCache
from diffusiongemma.models.execution import Execution, partition_spec
from diffusiongemma.models.expert_parallel import KERNEL_AXES, TOKEN_AXES
from diffusiongemma.models.moe import Experts
from diffusiongemma.parallel import MESH_AXES, make_mesh, on_mesh, rules_with
from diffusiongemma.parallel.sharding import LOGICAL_AXIS_RULES
from diffusiongemma.planning.compiler import _needed, advice, topology_devices
from diffusiongemma.planning.fit import largest_that_fits
from diffusiongemma.planning.programs import teacher_config
from diffusiongemma.planning.sampler_programs import cache_shardings

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'"
)
SMALL = (
    '--config=configs/tiny_diffusion.py', '--config.canvas_length=8', '--config.data.row_length=32',
    '--config.data.canvases_per_row=2', '--config.stage2.num_steps=1',
    '--config.stage1.self_conditioning_rate=0.0', '--optimization_level=O1',
)  # fmt: skip

LOOP = """
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %ag = f32[16,4]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=1, GROUPS, dimensions={0}
  %ar = f32[16,4]{1,0} all-reduce(%ag), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[]{:T(128)}, f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
  %again = f32[16,4]{1,0} all-gather(%a), channel_id=1, GROUPS, dimensions={0}
  ROOT %permuted = f32[8,4]{1,0} collective-permute(%a), channel_id=3, source_target_pairs={{0,2},{2,0}}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ('groups', 'axes'),
    [
        ('replica_groups={{0,1},{2,3}}', 'fsdp'),
        ('replica_groups=[2,2]<=[4]', 'fsdp'),
        ('replica_groups=[2,2]<=[2,2]T(1,0)', 'data'),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", 'fsdp'),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", 'fsdp'),
    ],
)
def test_collectives_count_as_often_as_their_loop_runs_and_know_their_axis(groups, axes):
    program = Program(LOOP.replace('GROUPS', groups))
    assert program.runs['body'] == 5
    by_kind = {c.kind: c for c in program.collectives({'data': 2, 'fsdp': 2})}
    # In a ring of 2, each device sends half of the 256 bytes. An all-gather with the same channel
    # is the same collective and counts once.
    assert by_kind['all-gather'] == Collective('all-gather', axes, 5, 5 * 128)
    assert by_kind['all-reduce'] == Collective('all-reduce', 'data+fsdp', 5, 5 * 2 * 256 * 3 / 4)
    assert by_kind['collective-permute'] == Collective('collective-permute', 'data', 1, 128)


EXCHANGED = """
ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %there = f32[8,4]{1,0} all-to-all(%a), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %back = f32[8,4]{1,0} all-to-all(%there), channel_id=1, replica_groups={{0,1},{2,3}}
}
"""


def test_collectives_of_one_computation_count_each_though_they_share_a_channel():
    (exchange,) = Program(EXCHANGED).collectives({'data': 2, 'expert': 2})
    assert exchange == Collective('all-to-all', 'expert', 2, 2 * 128 / 2)


def test_memory_traffic_leaves_out_what_is_on_the_chip():
    program = Program(LOOP.replace('GROUPS', 'replica_groups={{0,1},{2,3}}'))
    # The all-gather reads x from HBM and writes to the chip, where the all-reduce reads.
    gather, reduce = 128, 256
    condition = 4 + 4 + 1
    entry = (128 + 256) + (128 + 128)  # the all-gather and the permutation outside the loop
    assert program.hbm_bytes() == 5 * (gather + reduce + condition) + entry


SLICED = """
%async (p: s8[4096]) -> s8[1024] {
  %p = s8[4096]{0} parameter(0)
  ROOT %part = s8[1024]{0:S(1)} slice(%p), slice={[0:1024]}
}

ENTRY %main (w: s8[4096]) -> s8[1024] {
  %w = s8[4096]{0} parameter(0)
  %start = ((s8[4096]{0}), s8[1024]{0:S(1)}, s32[]{:S(2)}) async-start(%w), calls=%async
  ROOT %done = s8[1024]{0:S(1)} async-done(%start)
}
"""


def test_a_slice_that_is_fetched_ahead_counts_once_and_not_what_it_is_cut_out_of():
    assert Program(SLICED).hbm_bytes() == 1024


@pytest.mark.parametrize(
    ('message', 'needed'),
    [
        ('Ran out of memory in memory space hbm. Used 2.00G of 1.00G hbm.', 2 * 2**30),
        ('memory required for HLO temporaries (1.50M) exceeds available HBM', 1.5 * 2**20),
        ('something else', None),
    ],
)
def test_what_a_program_needs_is_read_from_the_compilers_complaint(message, needed):
    assert _needed(message) == needed


@pytest.mark.parametrize(
    'rules, rows, sliding, full',
    [
        # The cache is [G, B, K, R, H]: a ring of 7 slots with 2 heads, and 12 slots with 1 head.
        ({}, ('data', 'fsdp'), (None, None), (None, 'sequence')),
        ({'kv_heads': ('sequence',)}, ('data', 'fsdp'), ('sequence', None), (None, 'sequence')),
        ({'batch': ('data',), 'slots': ()}, 'data', (None, None), (None, None)),
    ],
)
def test_a_planned_cache_lies_as_the_axis_table_says(rules, rows, sliding, full, tiny_config):
    devices = np.array(jax.devices()).reshape(2, 2, 1, 2, 1)
    mesh = Mesh(devices, ('data', 'fsdp', 'expert', 'sequence', 'tensor'))
    assert set(mesh.axis_names) == set(MESH_AXES)
    model = on_mesh(DiffusionGemma(tiny_config), mesh, rules_with(rules))
    cache = jax.eval_shape(lambda: KVCache.create(tiny_config, 4, 12))
    shardings = cache_shardings(model, cache, mesh)
    assert shardings.lengths.spec == PartitionSpec(rows)
    for (keys, values), spec in zip(shardings.kv[0], (sliding, full), strict=True):
        assert keys.spec == values.spec == PartitionSpec(None, rows, *spec, None)


def plan(*flags, code=0):
    """Runs the command and returns the JSON that it prints, or its stderr if `code` is not 0."""
    process = subprocess.run(
        [sys.executable, '-m', 'diffusiongemma.plan', *flags],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1]) if code == 0 else process.stderr


@pytest.mark.slow
def test_a_step_is_planned_for_gpus_without_one():
    result = plan(*SMALL, '--topology=H100:4', '--config.mesh.data=2', '--config.mesh.fsdp=2')
    assert result['device']['name'] == 'H100' and result['mesh']['fsdp'] == 2
    (step,) = result['programs']
    assert step['fits'] and step['hbm_traffic'] is None
    assert step['needed'] > step['arguments'] >= 0.99 * sum(step['arguments_by_kind'].values())
    assert set(step['times']) == {'compute', 'interconnect'}
    assert step['times']['compute'] == pytest.approx(
        (step['model_flops'] + step['recomputed_flops']) / 4 / 989e12
    )
    assert any('fsdp' in collective['axes'] for collective in step['collectives'])
    assert 'write how many GPUs' in plan(*SMALL, '--topology=H100', code=1)


def test_a_gpu_is_told_from_another_whose_name_begins_alike():
    names = (
        'NVIDIA L4',
        'NVIDIA L40S',
        'NVIDIA L40',
        'NVIDIA A100-SXM4-40GB',
        'NVIDIA A100-SXM4-80GB',
    )
    assert [figures_of(name).name for name in names] == ['L4', 'L40S', 'L40', 'A100-40GB', 'A100']


@pytest.mark.slow
@needs_compiler
def test_a_step_is_planned_for_eight_tpus():
    result = plan(*SMALL, '--topology=v5e:2x4', '--config.mesh.data=2', '--config.mesh.fsdp=4')
    assert result['mesh']['fsdp'] == 4 and result['optimization_level'] == 'O1'
    (step,) = result['programs']
    assert step['fits'] and 0 < step['needed'] < result['device']['hbm_bytes']
    by_kind = step['arguments_by_kind']
    assert set(by_kind) == {'parameters', 'EMA', 'optimizer', 'frozen student', 'batch'}
    assert by_kind['EMA'] == by_kind['parameters']
    assert by_kind['optimizer'] == pytest.approx(2 * by_kind['parameters'], rel=1e-3)
    assert step['arguments'] >= sum(by_kind.values()) * 0.99
    assert step['model_flops'] > 0 and step['hbm_traffic'] > 0
    assert any('fsdp' in collective['axes'] for collective in step['collectives'])
    assert step['roofline_seconds'] == max(step['times'].values())
    assert 0.9 < step['ratios']['executed FLOPs'] < 1.25
    assert 0 < step['float32_copies'] <= 4
    assert {'HBM bytes', 'bytes sent'} <= set(step['ratios'])


@needs_compiler
def test_experts_on_tpus_multiply_each_row_once_and_read_each_weight_once():
    devices, _ = topology_devices('v5e:2x2')
    mesh = make_mesh({'tensor': 4}, devices)
    execution = Execution(mesh, LOGICAL_AXIS_RULES, platform='tpu')
    config, width = MoEConfig(num_experts=32, top_k=2, expert_width=96 * 4), 128
    experts = Experts(width, config, jnp.bfloat16, execution=execution)

    shapes = ((32, width, 384), (32, width, 384), (32, 384, width))
    kernels = {
        name: placed(execution, shape, jnp.bfloat16, axes)
        for name, shape, axes in zip(('gate', 'up', 'down'), shapes, KERNEL_AXES, strict=True)
    }
    x = placed(execution, (4, 1, 64, width), jnp.bfloat16, TOKEN_AXES)
    routing = [
        placed(execution, (4, 1, 64, 2), dtype, TOKEN_AXES) for dtype in ('float32', 'int32')
    ]

    def outputs(kernels, *inputs):
        return experts.apply({'params': kernels}, *inputs)

    def loss(*arguments):
        return jnp.sum(jnp.square(outputs(*arguments).astype(jnp.float32)))

    gradients = jax.grad(loss, (0, 1))
    model_flops = count_flops(gradients, kernels, x, *routing).model / mesh.size
    text = jax.jit(gradients).lower(kernels, x, *routing).compile().as_text()
    assert 0.9 * model_flops < executed_flops(Program(text)) < 1.25 * model_flops
    program = Program(jax.jit(outputs).lower(kernels, x, *routing).compile().as_text())
    shard = 'bf16[32,96,128]'  # the layout [32, 128, 96] would need padding to whole lanes
    assert sum(shape.startswith(shard) for shape in operand_shapes(program, 'custom-call')) == 3
    assert shard not in ''.join(result_shapes(program, ('copy', 'fusion', 'transpose')))
    entry = program.computations[program.entry]
    # The rows of experts are summed in float32, but not stored in it.
    assert not any(i.op == 'convert' and i.shape.startswith('f32[256,128]') for i in entry)


def placed(execution, shape, dtype, names):
    """Returns an abstract array whose sharding follows from the names of its logical axes."""
    sharding = NamedSharding(execution.mesh, partition_spec(execution.mesh_axes(shape, names)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def operand_shapes(program, op):
    """Yields the shapes of the operands of every instruction with an op."""
    for instructions in program.computations.values():
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            if instruction.op == op:
                yield from (shapes.get(name, '') for name in instruction.operands)


def result_shapes(program, ops):
    """Yields the shapes of the results of every instruction with one of some ops."""
    for instructions in program.computations.values():
        yield from (i.shape for i in instructions if i.op in ops)


@pytest.mark.parametrize(
    ('start', 'limit', 'largest', 'tried'),
    [(8, 35, 32, [8, 16, 32, 64]), (32, 9, 8, [32, 16, 8]), (12, 1, 12, [12]), (4, 3, 4, [4])],
)
def test_the_largest_batch_that_fits_is_found_by_doubling(start, limit, largest, tried):
    planned = []

    def plan(rows):
        planned.append(rows)
        return [SimpleNamespace(fits=True), SimpleNamespace(fits=rows <= limit, rows=rows)]

    rows, plans = largest_that_fits(start, 4, plan)
    assert (rows, planned, plans[1].rows) == (largest, tried, largest)


@needs_compiler
def test_a_mesh_that_does_not_cover_the_slice_says_so_and_what_would():
    error = plan(*SMALL, '--topology=v5e:2x4', '--config.mesh.data=4', code=1)
    assert 'v5e:2x4 has 8 devices' in error and '--config.mesh.fsdp=-1' in error
    assert 'Traceback' not in error


@needs_compiler
def test_a_slice_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no TPU topology 'v9:1x1'.*v5p:2x2x2"):
        topology_devices('v9:1x1')


def test_a_config_without_a_known_model_asks_for_a_preset():
    with pytest.raises(ValueError, match="no preset 'mine'.*--model"):
        teacher_config('', 'mine', None)


@pytest.mark.parametrize(
    ('state', 'expected'),
    [
        # 8 x 30 GB / (0.7 x 16 GB) rounds up to 22 devices.
        (30e9, 'at least 22 such devices and raise config.mesh.fsdp'),
        (2e9, 'lower config.data.batch_size, row_length or canvases_per_row'),
    ],
)
def test_what_to_change_depends_on_what_does_not_fit(state, expected):
    mesh = SimpleNamespace(size=8, shape={'data': 1, 'fsdp': 8})
    assert expected in advice({'parameters': state}, figures_of('TPU v5 lite'), mesh, 'step')


@needs_compiler
@pytest.mark.slow
def test_the_passes_of_the_sampler_are_planned():
    result = plan(*SMALL, '--topology=v5e:2x4', '--what=sampler', '--prompt_length=32')
    names = [program['name'] for program in result['programs']]
    assert names == ['generate', 'prefill', 'denoise step', 'commit']
    assert all(program['fits'] for program in result['programs'])


def test_without_the_compiler_it_says_how_to_get_it():
    if importlib.util.find_spec('libtpu') is not None:
        pytest.skip('libtpu is installed')
    assert "pip install -e '.[plan]'" in plan(*SMALL, '--topology=v5e:2x4', code=1)
