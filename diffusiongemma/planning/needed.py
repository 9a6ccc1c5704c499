"""Computes the minimum bytes that one device has to read, write and send, from shapes alone.

Plans compare the traffic of a compiled program with this minimum. The weights that a pass uses, the
cache, the training state and the logits count once, even if the program reads them several times.
Activations count only if a mesh has to exchange them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.models.config import MoEConfig
from diffusiongemma.models.denoiser import DENOISER_ALONE, DRAFT_IDS, DiffusionGemma
from diffusiongemma.models.execution import product
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel.sharding import rules_of


@dataclasses.dataclass(frozen=True)
class Needed:
    """The minimum traffic of one device, in bytes.

    Attributes:
      hbm: the bytes that the device reads from and writes to HBM.
      sent: the bytes that the device sends to other devices.
    """

    hbm: float
    sent: float

    def __add__(self, other: 'Needed') -> 'Needed':
        return Needed(self.hbm + other.hbm, self.sent + other.sent)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The sizes of one pass; token counts are for all devices together.

    Attributes:
      passed: the number of tokens that pass through the layers.
      scored: the number of positions that need logits.
      cached: the bytes of keys and values that one device reads or writes.
    """

    passed: int
    scored: int
    cached: float = 0.0


def of_pass(
    model: Gemma,
    params: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    rows: Sequence[str],
    tokens: Tokens,
    *,
    denoises: bool,
) -> Needed:
    """Returns the minimum traffic of one pass.

    Args:
      model: the model that runs the pass.
      params: all parameters of the model, as ShapeDtypeStructs with shardings.
      mesh: the mesh of the devices.
      rows: the mesh axes that split the batch. Weights that are split along them are gathered,
        except experts along the axis of experts, where tokens are sent instead.
      tokens: the sizes of the pass.
      denoises: whether it is a denoise pass; a separate or light denoiser has other weights.
    """
    config = model.config
    touched = dict(params)
    if config.has_frozen_encoder:
        for name in ('backbone',) if denoises else (*DENOISER_ALONE, DRAFT_IDS):
            touched.pop(name, None)
    rows_of_pass = tokens.passed / max(1, product(_without_experts(model, rows), mesh))
    expert_share = 1.0
    if config.moe is not None:
        expert_share = _touched_experts(config.moe, rows_of_pass)
    hbm = sent = 0.0
    itemsize = np.dtype(model.dtype).itemsize
    for path, leaf in jax.tree_util.tree_leaves_with_path(touched):
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            continue
        names = [getattr(key, 'key', '') for key in path]
        whole, shard = _gathered_and_shard(model, leaf, mesh, rows, 'experts' in names)
        share = expert_share if 'experts' in names else 1.0
        hbm += share * whole * itemsize
        sent += (whole - shard) * itemsize
    ways = product(dict(rules_of(model))['vocab'], mesh)
    device_rows = max(1, product(rows, mesh))
    hbm += tokens.cached + tokens.scored / device_rows * config.vocab_size / ways * 4
    return Needed(hbm, sent + _activations_sent(model, mesh, rows, tokens.passed / device_rows))


def of_update(trained: Any, state: Any, mesh: jax.sharding.Mesh, rows: Sequence[str]) -> Needed:
    """Returns the minimum traffic of one update of the training state, without the passes.

    The state is read and written once. Gradients are summed over the devices in float32, and each
    device keeps its shard of the sum.

    Args:
      trained: the trained parameters, as ShapeDtypeStructs with shardings.
      state: the parameters, EMA and optimizer moments, as ShapeDtypeStructs with shardings.
      mesh: the mesh of the devices.
      rows: the mesh axes that split the batch.
    """
    hbm = 2.0 * sum(_shard_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    sent = 0.0
    for leaf in jax.tree.leaves(trained):
        split = [axis for axes in _axes(leaf) for axis in axes]
        copies = product([axis for axis in rows if axis not in split], mesh)
        along = product([axis for axis in rows if axis in split], mesh)
        shard = 4.0 * _shard_size(leaf)
        sent += shard * (along - 1) + 2 * shard * (copies - 1) / copies
    return Needed(hbm, sent)


def _touched_experts(config: MoEConfig, tokens: float) -> float:
    """Returns the expected share of experts that a number of tokens reaches, if routed evenly."""
    untouched: float = (1.0 - config.top_k / config.num_experts) ** tokens
    return 1.0 - untouched


def _without_experts(model: Gemma, rows: Sequence[str]) -> list[str]:
    return [axis for axis in rows if axis not in dict(rules_of(model))['experts']]


def _gathered_and_shard(
    model: Gemma, leaf: Any, mesh: jax.sharding.Mesh, rows: Sequence[str], of_experts: bool
) -> tuple[float, float]:
    """Returns the number of elements of a weight that a device uses, and that it stores."""
    gathered = _without_experts(model, rows) if of_experts else rows
    shard = _shard_size(leaf)
    along = [axis for axes in _axes(leaf) for axis in axes if axis in gathered]
    return shard * product(along, mesh), shard


def _axes(leaf: Any) -> list[tuple[str, ...]]:
    spec = leaf.sharding.spec
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


def _shard_size(leaf: Any) -> float:
    return float(np.prod(leaf.sharding.shard_shape(leaf.shape)))


def _activations_sent(
    model: Gemma, mesh: jax.sharding.Mesh, rows: Sequence[str], tokens: float
) -> float:
    """Returns the bytes sent to sum partial results, and to send tokens to experts and back."""
    config, rules = model.config, dict(rules_of(model))
    itemsize: int = np.dtype(model.dtype).itemsize
    light = model.light if isinstance(model, DiffusionGemma) else None
    layers = config.num_layers if light is None else len(light.layers)
    ways = product(rules['mlp'], mesh)
    sums = 2 + (config.moe is not None)  # attention, MLP, experts
    sent = sums * 2 * tokens * config.width * itemsize * (ways - 1) / ways
    exchanging = [axis for axis in rules['experts'] if axis in rows]
    ways = product(exchanging, mesh)
    if config.moe is not None and ways > 1:
        sent += 2 * tokens * config.moe.top_k * config.width * itemsize * (ways - 1) / ways
    return layers * sent
