r"""Compiles only the routed experts of 26B-A4B for a TPU slice and counts their operations.

It needs the TPU compiler (pip install -e '.[plan]') and no TPU. Compilation takes about ten
seconds.

  python benchmarks/experts_plan.py --topology=v5p:2x2x2 --mesh=fsdp:8 --rows=8 --tokens=1792
  python benchmarks/experts_plan.py --topology=v6e:2x2 --mesh=tensor:4 --rows=8 --tokens=256 \
    --layers=4

With `--layers` it compiles the forward pass of that many unrolled layers, as in sampling, and
otherwise the gradients of one layer.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding

from diffusiongemma.accounting.executed import executed_flops
from diffusiongemma.accounting.flops import count_flops
from diffusiongemma.accounting.hlo import Program
from diffusiongemma.models.execution import Execution, partition_spec
from diffusiongemma.models.expert_parallel import KERNEL_AXES, TOKEN_AXES
from diffusiongemma.models.moe import Experts
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.parallel import make_mesh
from diffusiongemma.parallel.sharding import LOGICAL_AXIS_RULES
from diffusiongemma.planning.compiler import topology_devices

_TOPOLOGY = flags.DEFINE_string('topology', 'v5p:2x2x2', 'TPU slice.')
_MESH = flags.DEFINE_list('mesh', ['fsdp:8'], 'Mesh axes and their sizes.')
_ROWS = flags.DEFINE_integer('rows', 8, 'Rows of the batch.')
_TOKENS = flags.DEFINE_integer('tokens', 1792, 'Tokens of a row.')
_LAYERS = flags.DEFINE_integer('layers', 0, 'Layers of a forward pass; 0: gradients of one layer.')


def main(argv: list[str]) -> None:
    del argv
    devices, _ = topology_devices(_TOPOLOGY.value)
    axes = dict(axis.split(':') for axis in _MESH.value)
    mesh = make_mesh({name: int(size) for name, size in axes.items()}, devices)
    execution = Execution(mesh, LOGICAL_AXIS_RULES, platform='tpu')
    config = PRESETS['gemma4_26b_a4b']
    experts = Experts(config.width, config.moe, jnp.bfloat16, execution=execution)

    def placed(shape: tuple[int, ...], dtype: Any, names: tuple) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(execution.mesh_axes(shape, names)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    d, f = config.width, config.moe.expert_width
    dtype = jnp.bfloat16 if _LAYERS.value else jnp.float32
    shapes = ((config.moe.num_experts, *widths) for widths in ((d, f), (d, f), (f, d)))
    kernels = {
        name: placed(shape, dtype, axes)
        for name, shape, axes in zip(('gate', 'up', 'down'), shapes, KERNEL_AXES, strict=True)
    }
    tokens = (_ROWS.value, 1, _TOKENS.value)
    x = placed((*tokens, d), jnp.bfloat16, TOKEN_AXES)
    routing = [placed((*tokens, config.moe.top_k), t, TOKEN_AXES) for t in ('float32', 'int32')]

    def layers(kernels: list[Any], x: jax.Array, *routing: jax.Array) -> jax.Array:
        for layer in kernels:
            x = experts.apply({'params': layer}, x, *routing)
        return x

    def loss(*arguments: Any) -> jax.Array:
        return jnp.sum(jnp.square(layers(*arguments).astype(jnp.float32)))

    function = layers if _LAYERS.value else jax.grad(loss, (0, 1, 2))
    arguments = ([kernels] * (_LAYERS.value or 1), x, *routing)
    model = count_flops(function, *arguments).model / mesh.size
    program = Program(jax.jit(function).lower(*arguments).compile().as_text())
    print(
        json.dumps(
            {
                'model TFLOP of a device': model / 1e12,
                'executed / model': executed_flops(program) / model,
                'whole tiles / model': executed_flops(program, whole_tiles=True) / model,
                'HBM GB': program.hbm_bytes() / 1e9,
            }
        )
    )


if __name__ == '__main__':
    app.run(main)
