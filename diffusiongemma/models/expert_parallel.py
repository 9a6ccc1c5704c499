"""Routed experts on a mesh: every device has some of the experts and some of the tokens.

All of it runs inside one `jax.shard_map`, so that tokens are sorted by expert on the device that
has them (a global sort would gather them), and the exchange is what is written here and nothing
else.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.execution import Execution, partition_spec
from diffusiongemma.models.execution import product as product_of
from diffusiongemma.models.grouped import grouped_product
from diffusiongemma.models.weights import WEIGHTS

Kernels = tuple[jax.Array, jax.Array, jax.Array]

# Room for a peer in one round of the exchange, relative to the mean. Twice the mean serves nearly
# every batch of a balanced router in one round; what is over goes in further rounds.
ROUND_SLACK = 2.0

TOKEN_AXES = ('batch', None, 'length', None)
KERNEL_AXES = tuple(WEIGHTS[f'experts/{name}'].axes for name in ('gate', 'up', 'down'))
_EMBED = WEIGHTS['experts/down'].outputs[0]  # the width D


def grouped_mlps(
    x: jax.Array, token: jax.Array, expert: jax.Array, kernels: Kernels, *, every: bool = False
) -> jax.Array:
    """Gated MLPs of n (token, expert) pairs as three grouped matmuls over pairs sorted by expert.

    Args:
      x: [t, D].
      token: [n] int32, row of x of each pair.
      expert: [n] int32 in [0, E); E stands for no expert at all, whose output is zero.
      kernels: gate and up [E, D, F], down [E, F, D], in the dtype of x.
      every: every pair has an expert.

    Returns:
      [n, D] in the dtype of x, in the order of the pairs.
    """
    outputs, place = _sorted_mlps(x, token, expert, kernels, every)
    return outputs.at[place].get(unique_indices=True)


def routed_mlps(
    x: jax.Array, weights: jax.Array, experts: jax.Array, kernels: Kernels, *, every: bool
) -> jax.Array:
    """The weighted sum of the outputs of each token's experts.

    The outputs of all pairs are never in memory in the order of the pairs, nor in float32.

    Args:
      x: [t, D].
      weights: [t, k].
      experts: [t, k] int32 in [0, E]; E stands for no expert, whose output is zero.
      kernels: as for `grouped_mlps`.
      every: as for `grouped_mlps`.

    Returns:
      [t, D] float32.
    """
    token = jnp.arange(experts.size) // experts.shape[-1]  # of each pair
    outputs, place = _sorted_mlps(x, token, experts.reshape(-1), kernels, every)
    return _weighted_sums(outputs, weights.astype(x.dtype), place.reshape(experts.shape))


@jax.custom_vjp
def _weighted_sums(outputs: jax.Array, weights: jax.Array, place: jax.Array) -> jax.Array:
    """Sums of rows [n, D] by weights [t, k], row place[t, k] for each: [t, D] float32."""
    total = jnp.zeros((place.shape[0], outputs.shape[1]), jnp.float32)
    for choice in range(place.shape[1]):
        own = outputs.at[place[:, choice]].get(unique_indices=True)
        total += own.astype(jnp.float32) * weights[:, choice, None].astype(jnp.float32)
    return total


def _sums_forward(outputs: jax.Array, weights: jax.Array, place: jax.Array):
    return _weighted_sums(outputs, weights, place), (outputs, weights, place)


def _sums_backward(residuals: tuple[jax.Array, ...], gradient: jax.Array):
    """By gathers alone, in the order of the rows: every row belongs to one token."""
    outputs, weights, place = residuals
    flat = place.reshape(-1)
    order = jnp.zeros_like(flat).at[flat].set(jnp.arange(flat.size), unique_indices=True)
    rows = gradient.astype(outputs.dtype)[order // place.shape[1]]
    by_outputs = rows * weights.reshape(-1)[order][:, None]
    products = rows.astype(jnp.float32) * outputs.astype(jnp.float32)
    by_weights = jnp.sum(products, axis=1)[flat].reshape(weights.shape)
    return by_outputs, by_weights.astype(weights.dtype), None


_weighted_sums.defvjp(_sums_forward, _sums_backward)


def _sorted_mlps(
    x: jax.Array, token: jax.Array, expert: jax.Array, kernels: Kernels, every: bool
) -> tuple[jax.Array, jax.Array]:
    """Outputs [n, D] of the pairs sorted by expert, and the place [n] of each pair among them."""
    gate, up, down = kernels
    order = jnp.argsort(expert)  # stable: pairs of one expert stay in order
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    sizes = jnp.bincount(expert, length=gate.shape[0]).astype(jnp.int32)
    # Rows of no expert are last, and hold whatever the platform leaves there, forward and backward.
    inside = (jnp.arange(expert.size) < jnp.sum(sizes))[:, None]
    rows = x[token[order]]
    rows = rows if every else jnp.where(inside, rows, 0)
    hidden = nn.gelu(grouped_product(rows, gate, sizes), approximate=True)
    hidden *= grouped_product(rows, up, sizes)
    outputs = grouped_product(hidden.astype(x.dtype), down, sizes, x.dtype)
    return outputs if every else jnp.where(inside, outputs, 0), place


def check_experts(num_experts: int, execution: Execution) -> None:
    """Raises ValueError when the experts can't be dealt out evenly over their mesh axes."""
    axes, mesh = dict(execution.rules)['experts'], execution.mesh
    assert mesh is not None  # nothing is dealt out without one
    ways = product_of(axes, mesh)
    if num_experts % ways:
        raise ValueError(
            f'num_experts={num_experts} is not divisible by {" x ".join(axes)} = {ways} of the '
            f'mesh; give that axis a size that divides {num_experts}.'
        )
    if sum(mesh.shape[axis] > 1 for axis in axes) > 1:
        raise ValueError(
            f'experts lie on the mesh axes {axes}, but tokens are exchanged along one: give the '
            'rule of experts one axis.'
        )


def experts_on_mesh(
    x: jax.Array, weights: jax.Array, experts: jax.Array, kernels: Kernels, execution: Execution
) -> jax.Array:
    """What `Experts` computes, with tokens and experts spread over the mesh.

    Where tokens are spread over the axis of the experts they are exchanged along it by
    `all_to_all` (`exchanged_pairs`). Where they are not (too few rows to split) each device has
    all of them already: it computes the part of its own experts and the parts are added up. On
    a mesh with one expert shard neither happens.

    Args:
      x: [B, M, T, D].
      weights: [B, M, T, k] float32.
      experts: [B, M, T, k] int32.
      kernels: gate and up [E, D, F], down [E, F, D], in the dtype of x.
      execution: mesh and rules.

    Returns:
      [B, M, T, D] in the dtype of x.

    Raises:
      ValueError: the experts can't be dealt out evenly.
    """
    check_experts(kernels[0].shape[0], execution)
    mesh = execution.mesh
    assert mesh is not None  # see `check_experts`
    tokens = execution.mesh_axes(x.shape, TOKEN_AXES)
    of_tokens = {axis for axes in tokens for axis in axes}
    laid = [
        execution.mesh_axes(kernel.shape, names)
        for kernel, names in zip(kernels, KERNEL_AXES, strict=True)
    ]
    along = laid[0][0]  # the axis of the experts, or none
    split = laid[0][2]  # of the width F: partial sums
    # An axis that splits D of the kernels is gathered here, if it splits the tokens as well: the
    # gradient is then summed and split in one go. Else the compiler gathers it.
    gathered = tuple(axis for axis in laid[0][1] if axis in of_tokens)
    kernel_axes = [
        [
            tuple(a for a in axes if a in gathered) if name == _EMBED else axes
            for axes, name in zip(laid[i], names, strict=True)
        ]
        for i, names in enumerate(KERNEL_AXES)
    ]
    exchange = bool(along) and along[0] in of_tokens
    summed = split + (() if exchange else along)

    def local(x: jax.Array, weights: jax.Array, experts: jax.Array, *kernels: *Kernels):
        if gathered:
            kernels = _gathered_kernels(kernels, gathered)
        width, top_k = x.shape[-1], experts.shape[-1]
        flat = experts.reshape(-1, top_k)
        if exchange:
            devices = tuple(axis for axis in mesh.axis_names if axis in of_tokens)
            ways = mesh.shape[along[0]]
            given = (x.reshape(-1, width), flat.reshape(-1), kernels)
            pairs = exchanged_pairs(*given, along[0], ways, devices)
            outputs = jnp.einsum(
                'tkd,tk->td',
                pairs.reshape(-1, top_k, width),
                weights.reshape(-1, top_k).astype(x.dtype),
                preferred_element_type=jnp.float32,
            )
        else:
            flat = _numbers_of_own(flat, kernels[0].shape[0], along)
            routed = (x.reshape(-1, width), weights.reshape(-1, top_k), flat, kernels)
            outputs = routed_mlps(*routed, every=not along)
        outputs = outputs.reshape(x.shape)
        return (jax.lax.psum(outputs, summed) if summed else outputs).astype(x.dtype)

    of_x, *of_kernels = (partition_spec(axes) for axes in (tokens, *kernel_axes))
    on_mesh = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(of_x, of_x, of_x, *of_kernels),
        out_specs=of_x,
        check_vma=False,  # grouped kernels do not say over which axes their results differ
    )
    return on_mesh(x, weights, experts, *kernels)


def _numbers_of_own(experts: jax.Array, own: int, along: tuple[str, ...]) -> jax.Array:
    """The experts as numbers of a device's own in [0, own); `own` for those of other devices."""
    if along:
        experts = experts - own * jax.lax.axis_index(along[0])
    return jnp.where((experts >= 0) & (experts < own), experts, own)


def _gathered_kernels(kernels: Kernels, axes: tuple[str, ...]) -> Kernels:
    """The kernels of a device with all of D, which is split over some mesh axes."""
    gate, up, down = (
        jax.lax.all_gather(kernel, axes, axis=names.index(_EMBED), tiled=True)
        for kernel, names in zip(kernels, KERNEL_AXES, strict=True)
    )
    return gate, up, down


def exchanged_pairs(
    x: jax.Array,
    experts: jax.Array,
    kernels: Kernels,
    axis: str,
    ways: int,
    every: tuple[str, ...],
) -> jax.Array:
    """Outputs of n (token, expert) pairs whose experts are anywhere along a mesh axis.

    Each device sends every pair to the device of its expert, which sends the output back. Shapes
    are static and a router may send everything to one device, so a buffer for the worst case
    would hold `ways` times the pairs of a device, in `jax.lax.ragged_all_to_all` as well (and
    that is not to be had on CPUs). Instead pairs go in rounds with room for `ROUND_SLACK` times
    the mean: memory is that of two pairs for each own one, the usual batch needs one round, and
    rounds that no device needs are skipped. None is dropped: there are rounds for the worst case.
    The devices agree on a round, since all of them must take part in it; backward each further
    round is recomputed, so that skipped ones keep no memory.

    Runs inside `jax.shard_map`.

    Args:
      x: [t, D], tokens of this device.
      experts: [n] int32 with n = t * k, experts of its tokens, k behind each other.
      kernels: those of its E / ways experts.
      axis: mesh axis of the experts.
      ways: devices along it.
      every: all mesh axes that tokens are spread over.

    Returns:
      [n, D].
    """
    num_pairs, top_k, own = experts.size, experts.size // x.shape[0], kernels[0].shape[0]
    worst = x.shape[0] * min(top_k, own)  # the experts of a token differ
    room = min(worst, math.ceil(ROUND_SLACK * num_pairs / ways))
    order = jnp.argsort(experts)  # by destination, too
    counts = jnp.bincount(experts // own, length=ways)  # [ways] pairs for each device
    starts = jnp.cumsum(counts) - counts
    most = jax.lax.pmax(jnp.max(counts), every)
    send = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)

    def take_round(first: jax.Array | int, outputs: jax.Array) -> jax.Array:
        """Pairs number `first` and the following of each destination."""
        place = first + jnp.arange(room)
        used = place < counts[:, None]  # [ways, room]
        pair = order[jnp.minimum(starts[:, None] + place, num_pairs - 1)]
        tokens = jnp.where(used[..., None], x[pair // top_k], 0)
        tokens = send(tokens).reshape(ways * room, -1)
        expert = send(jnp.where(used, experts[pair] % own, own)).reshape(-1)
        token = jnp.arange(expert.size)
        results = grouped_mlps(tokens, token, expert, kernels)
        results = send(results.reshape(ways, room, -1))
        return outputs.at[jnp.where(used, pair, num_pairs)].set(results, mode='drop')

    def next_round(outputs: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        take = jax.checkpoint(functools.partial(take_round, first))
        return jax.lax.cond(first < most, take, lambda outputs: outputs, outputs), None

    outputs = take_round(0, jnp.zeros((num_pairs, x.shape[-1]), x.dtype))
    if room < worst:
        firsts = jnp.arange(room, worst, room)
        outputs, _ = jax.lax.scan(next_round, outputs, firsts)
    return outputs
