"""Tests that weights are loaded into their shards with exact values and little host memory."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from diffusiongemma.checkpoints import hf_import
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.placement import assemble
from diffusiongemma.parallel import make_mesh, param_shardings

DATA = Path(__file__).parent / 'data'


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize('source', [DATA / 'tiny_moe', 'builtin'])
def test_parameters_are_created_in_the_shards_of_the_mesh(source):
    mesh = make_mesh({'fsdp': 2, 'tensor': 2, 'expert': 2})
    model, params, _ = load_model(source, jnp.bfloat16, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    assert placed == param_shardings(model, mesh)
    up = params['backbone']['layers']['layer_0']['mlp']['up']
    assert up.addressable_shards[0].data.size == up.size // 8
    assert_trees_equal(params, load_model(source, jnp.bfloat16)[1])


def test_without_a_dtype_parameters_keep_the_one_that_is_stored():
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(load_model('builtin', None)[1])}
    assert dtypes == {jnp.dtype('bfloat16')}


def test_a_stack_is_filled_layer_by_layer_in_every_shard():
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    whole = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp', 'tensor'))
    stacked = assemble(whole.shape, None, sharding, enumerate(whole))
    np.testing.assert_array_equal(stacked, whole)
    assert stacked.sharding == sharding


def test_what_is_left_out_is_reported_by_part_with_counts(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, 'info', lambda text, *args: lines.append(text % args))
    hf_import.load_hf(DATA / 'tiny_moe', jnp.float32)
    (left_out,) = [line for line in lines if 'left out' in line]
    assert 'vision_tower' in left_out
    assert sum(map(int, re.findall(r'\((\d+)\)', left_out))) == 16


MEASURE = """
    import json, sys
    from pathlib import Path
    import jax, jax.numpy as jnp, ml_dtypes, numpy as np
    from diffusiongemma.checkpoints.hf_export import save_hf
    from diffusiongemma.checkpoints.load import load_model
    from diffusiongemma.checkpoints.placement import param_shapes
    from diffusiongemma.models import AttentionConfig, Gemma, ModelConfig
    from diffusiongemma.parallel import make_mesh
    from flax.traverse_util import unflatten_dict

    config = ModelConfig(
        vocab_size=8192, width=1024, num_heads=8, ffn_width=2048,
        layer_types=(('sliding',) * 5 + ('full',)) * 2,
        sliding=AttentionConfig(num_kv_heads=4, head_dim=128, window=64),
        full=AttentionConfig(num_kv_heads=2, head_dim=256, rope_theta=1e6, value_is_key=True),
    )
    directory = Path(sys.argv[2])
    shapes = param_shapes(Gemma(config))
    if sys.argv[1] == 'write':
        rng = np.random.default_rng(0)
        one = rng.standard_normal(max(np.prod(s) for s in shapes.values()), np.float32)
        one = one.astype(ml_dtypes.bfloat16)
        params = {name: one[: int(np.prod(s))].reshape(s) for name, s in shapes.items()}
        save_hf(directory, config, unflatten_dict(params, sep='/'), max_shard_bytes=10**8)
        sys.exit()
    def memory(field):
        status = dict(line.split(':') for line in open('/proc/self/status'))
        return int(status[field].split()[0]) * 1024
    mesh = make_mesh({'fsdp': 8})
    jax.block_until_ready(jax.device_put(jnp.zeros(8), jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec('fsdp'))))
    before = memory('VmRSS')
    model, params, _ = load_model(directory, jnp.bfloat16, mesh)
    jax.block_until_ready(params)
    used = memory('VmHWM') - before
    layers = [v.nbytes for k, v in jax.tree_util.tree_leaves_with_path(params)
              if 'layers' in jax.tree_util.keystr(k)]
    print(json.dumps({
        'total': sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        'layer_group': sum(layers) // config.kv_layers.num_groups,
        'above': used - sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_the_host_needs_less_than_a_layer_group_above_what_the_devices_hold(tmp_path):
    """On a CPU the devices use host memory, so their part is subtracted from the peak."""

    def run(what):
        command = [sys.executable, '-c', textwrap.dedent(MEASURE), what, str(tmp_path / 'model')]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
        return done.stdout

    run('write')
    found = json.loads(run('measure').splitlines()[-1])
    assert found['total'] > 200e6
    assert found['above'] < found['layer_group'], found
