"""Computes routed experts, on one device or on a mesh that splits experts and tokens.

On a mesh, everything runs inside one `jax.shard_map`, so that each device sorts only its own tokens
by expert (a global sort would gather them), and the only communication is the one in this file.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.execution import Execution, partition_spec
from diffusiongemma.models.execution import product as product_of
from diffusiongemma.models.kernels.grouped import grouped_product
from diffusiongemma.models.weights import WEIGHTS

Kernels = tuple[jax.Array, jax.Array, jax.Array]

# In one round of the exchange a device can send each other device this many times the mean number
# of token-expert pairs. With twice the mean, nearly every batch of a balanced router needs one
# round; pairs that do not fit are sent in further rounds.
ROUND_SLACK = 2.0

TOKEN_AXES = ('batch', None, 'length', None)
KERNEL_AXES = tuple(WEIGHTS[f'experts/{name}'].axes for name in ('gate', 'up', 'down'))
_EMBED = WEIGHTS['experts/down'].outputs[0]  # the width D


def grouped_mlps(
    x: jax.Array, token: jax.Array, expert: jax.Array, kernels: Kernels, *, every: bool = False
) -> jax.Array:
    """Returns the outputs of the experts' gated MLPs for n token-expert pairs.

    The MLPs are three grouped matmuls over the pairs sorted by expert.

    Args:
      x: [t, D], the inputs of the tokens.
      token: [n] int32, the row of x of each pair.
      expert: [n] int32 in [0, E], the expert of each pair. E means no expert: the output is zero.
      kernels: gate and up [E, D, F], down [E, F, D], in the dtype of x.
      every: whether every pair has an expert, so that no output needs to be set to zero.

    Returns:
      [n, D] in the dtype of x, in the order of the pairs.
    """
    outputs, place = _sorted_mlps(x, token, expert, kernels, every)
    return outputs.at[place].get(unique_indices=True)


def routed_mlps(
    x: jax.Array, weights: jax.Array, experts: jax.Array, kernels: Kernels, *, every: bool
) -> jax.Array:
    """Returns the weighted sum of the outputs of each token's experts.

    It never stores the outputs of all pairs in the order of the pairs, nor in float32.

    Args:
      x: [t, D], the inputs of the tokens.
      weights: [t, k], the routing weights.
      experts: [t, k] int32 in [0, E], the experts of each token. E means no expert: the output is
        zero.
      kernels: gate and up [E, D, F], down [E, F, D], in the dtype of x.
      every: whether every pair has an expert, so that no output needs to be set to zero.

    Returns:
      [t, D] float32.
    """
    token = jnp.arange(experts.size) // experts.shape[-1]  # [t * k], the token of each pair
    outputs, place = _sorted_mlps(x, token, experts.reshape(-1), kernels, every)
    return _weighted_sums(outputs, weights.astype(x.dtype), place.reshape(experts.shape))


@jax.custom_vjp
def _weighted_sums(outputs: jax.Array, weights: jax.Array, place: jax.Array) -> jax.Array:
    """Returns sum(weights [t, k] * outputs[place] [t, k, D]) over k: [t, D] float32."""
    total = jnp.zeros((place.shape[0], outputs.shape[1]), jnp.float32)
    for choice in range(place.shape[1]):
        rows = outputs.at[place[:, choice]].get(unique_indices=True)  # [t, D]
        total += rows.astype(jnp.float32) * weights[:, choice, None].astype(jnp.float32)
    return total


def _sums_forward(
    outputs: jax.Array, weights: jax.Array, place: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _weighted_sums(outputs, weights, place), (outputs, weights, place)


def _sums_backward(
    residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """Returns the gradients in the order of the rows, which needs gathers but no scatter-add.

    Each row belongs to exactly one token.
    """
    outputs, weights, place = residuals
    flat = place.reshape(-1)  # [n], n = t * k
    order = jnp.zeros_like(flat).at[flat].set(jnp.arange(flat.size), unique_indices=True)
    rows = gradient.astype(outputs.dtype)[order // place.shape[1]]  # [n, D]
    by_outputs = rows * weights.reshape(-1)[order][:, None]
    products = rows.astype(jnp.float32) * outputs.astype(jnp.float32)
    by_weights = jnp.sum(products, axis=1)[flat].reshape(weights.shape)  # [t, k]
    return by_outputs, by_weights.astype(weights.dtype), None


_weighted_sums.defvjp(_sums_forward, _sums_backward)


def _sorted_mlps(
    x: jax.Array, token: jax.Array, expert: jax.Array, kernels: Kernels, every: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs [n, D] of the pairs sorted by expert, and the row [n] of each pair."""
    gate, up, down = kernels
    order = jnp.argsort(expert)  # [n], stable: the pairs of one expert stay in order
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    sizes = jnp.bincount(expert, length=gate.shape[0]).astype(jnp.int32)  # [E]
    # Rows without an expert are last; their values are undefined in the forward and backward pass.
    inside = (jnp.arange(expert.size) < jnp.sum(sizes))[:, None]  # [n, 1]
    rows = x[token[order]]  # [n, D]
    rows = rows if every else jnp.where(inside, rows, 0)
    hidden = nn.gelu(grouped_product(rows, gate, sizes), approximate=True)  # [n, F]
    hidden *= grouped_product(rows, up, sizes)
    outputs = grouped_product(hidden.astype(x.dtype), down, sizes, x.dtype)
    return outputs if every else jnp.where(inside, outputs, 0), place


def check_experts(num_experts: int, execution: Execution) -> None:
    """Raises ValueError if the mesh axes of experts cannot split the experts evenly."""
    axes, mesh = dict(execution.rules)['experts'], execution.mesh
    assert mesh is not None  # callers check this
    ways = product_of(axes, mesh)
    if num_experts % ways:
        raise ValueError(
            f'num_experts={num_experts} is not divisible by {" x ".join(axes)} = {ways} of the '
            f'mesh; give that axis a size that divides {num_experts}.'
        )
    if sum(mesh.shape[axis] > 1 for axis in axes) > 1:
        raise ValueError(
            f'experts are split along the mesh axes {axes}, but tokens can be exchanged along only '
            'one: name a single axis in the rule for experts.'
        )


def experts_on_mesh(
    x: jax.Array, weights: jax.Array, experts: jax.Array, kernels: Kernels, execution: Execution
) -> jax.Array:
    """Returns the output of the layer `Experts`, with tokens and experts split over the mesh.

    If the axis of experts also splits the tokens, they are exchanged along it by `all_to_all`
    (`exchanged_pairs`). If it does not, because there are too few rows to split, each device has
    all tokens: it computes the outputs of its own experts, and these are summed over the devices.
    On a mesh that does not split the experts, neither is necessary.

    Args:
      x: [B, M, T, D], the inputs of the tokens.
      weights: [B, M, T, k] float32, the routing weights.
      experts: [B, M, T, k] int32 in [0, E), the experts of each token.
      kernels: gate and up [E, D, F], down [E, F, D], in the dtype of x.
      execution: the mesh and the rules from logical axes to mesh axes.

    Returns:
      [B, M, T, D] in the dtype of x.

    Raises:
      ValueError: if the mesh axes of experts cannot split the experts evenly.
    """
    check_experts(kernels[0].shape[0], execution)
    mesh = execution.mesh
    assert mesh is not None  # see `check_experts`
    x_axes = execution.mesh_axes(x.shape, TOKEN_AXES)
    token_axes = {axis for axes in x_axes for axis in axes}
    stored_axes = [
        execution.mesh_axes(kernel.shape, names)
        for kernel, names in zip(kernels, KERNEL_AXES, strict=True)
    ]
    along = stored_axes[0][0]  # the axis that splits the experts, or none
    split = stored_axes[0][2]  # the axes that split the width F, which makes outputs partial sums
    # An axis that splits D of the kernels is gathered in `local` if it also splits the tokens, so
    # that one reduce-scatter sums and splits the gradient. Otherwise the compiler gathers it.
    gathered = tuple(axis for axis in stored_axes[0][1] if axis in token_axes)
    kernel_axes = [
        [
            tuple(a for a in axes if a in gathered) if name == _EMBED else axes
            for axes, name in zip(stored_axes[i], names, strict=True)
        ]
        for i, names in enumerate(KERNEL_AXES)
    ]
    exchange = bool(along) and along[0] in token_axes
    summed = split + (() if exchange else along)

    def local(
        x: jax.Array, weights: jax.Array, experts: jax.Array, *kernels: *Kernels
    ) -> jax.Array:
        if gathered:
            kernels = _gathered_kernels(kernels, gathered)
        width, top_k = x.shape[-1], experts.shape[-1]
        flat = experts.reshape(-1, top_k)  # [t, k]
        if exchange:
            devices = tuple(axis for axis in mesh.axis_names if axis in token_axes)
            ways = mesh.shape[along[0]]
            inputs = (x.reshape(-1, width), flat.reshape(-1), kernels)
            pairs = exchanged_pairs(*inputs, along[0], ways, devices)  # [t * k, D]
            pairs = pairs.reshape(-1, top_k, width)
            routing = weights.reshape(-1, top_k).astype(x.dtype)
            outputs = jnp.einsum('tkd,tk->td', pairs, routing, preferred_element_type=jnp.float32)
        else:
            flat = _local_experts(flat, kernels[0].shape[0], along)
            routed = (x.reshape(-1, width), weights.reshape(-1, top_k), flat, kernels)
            outputs = routed_mlps(*routed, every=not along)  # [t, D]
        outputs = jax.lax.psum(outputs, summed) if summed else outputs
        return outputs.astype(x.dtype).reshape(x.shape)  # if earlier, XLA would store float32 rows

    x_spec, *kernel_specs = (partition_spec(axes) for axes in (x_axes, *kernel_axes))
    on_mesh = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(x_spec, x_spec, x_spec, *kernel_specs),
        out_specs=x_spec,
        check_vma=False,  # grouped kernels do not declare over which axes their results differ
    )
    outputs: jax.Array = on_mesh(x, weights, experts, *kernels)
    return outputs


def _local_experts(experts: jax.Array, count: int, along: tuple[str, ...]) -> jax.Array:
    """Returns local ids in [0, count) for a device's own experts, and `count` for all others."""
    if along:
        experts = experts - count * jax.lax.axis_index(along[0])
    return jnp.where((experts >= 0) & (experts < count), experts, count)


def _gathered_kernels(kernels: Kernels, axes: tuple[str, ...]) -> Kernels:
    """Returns a device's kernels with the whole width D, which some mesh axes split."""
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
    token_axes: tuple[str, ...],
) -> jax.Array:
    """Returns the outputs of n token-expert pairs whose experts are split along a mesh axis.

    Each device sends every pair to the device of its expert, which sends the output back. Shapes
    are static and a router may send all pairs to one device, so a buffer for the worst case would
    hold `ways` times the pairs of a device. This is also true of `jax.lax.ragged_all_to_all`, which
    CPUs do not support. Instead, pairs are sent in rounds, each with a capacity of `ROUND_SLACK`
    times the mean for each device. The buffers therefore hold two pairs for each pair of the
    device, a typical batch needs one round, and a round that no device needs is skipped. No pair is
    dropped, because there are enough rounds for the worst case. The devices agree on each round,
    since all of them must take part in it. The backward pass recomputes every round after the
    first, so that skipped rounds store nothing.

    This function must be called inside `jax.shard_map`.

    Args:
      x: [t, D], the tokens of this device.
      experts: [n] int32 with n = t * k, the experts of these tokens, k consecutive ones per token.
      kernels: the kernels of the E / ways experts of this device.
      axis: the mesh axis that splits the experts.
      ways: the number of devices along `axis`.
      token_axes: all mesh axes that split the tokens.

    Returns:
      [n, D] in the dtype of x, in the order of the pairs.
    """
    num_pairs, top_k, num_local = experts.size, experts.size // x.shape[0], kernels[0].shape[0]
    worst = x.shape[0] * min(top_k, num_local)  # the experts of a token are distinct
    capacity = min(worst, math.ceil(ROUND_SLACK * num_pairs / ways))
    order = jnp.argsort(experts)  # [n], this also sorts by destination
    counts = jnp.bincount(experts // num_local, length=ways)  # [ways], the pairs for each device
    starts = jnp.cumsum(counts) - counts  # [ways], the first pair of each device in `order`
    largest_count = jax.lax.pmax(jnp.max(counts), token_axes)
    send = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)

    def take_round(first: jax.Array | int, outputs: jax.Array) -> jax.Array:
        """Fills in the outputs of up to `capacity` pairs per destination, from pair `first` on."""
        place = first + jnp.arange(capacity)  # [capacity]
        used = place < counts[:, None]  # [ways, capacity]
        pair = order[jnp.minimum(starts[:, None] + place, num_pairs - 1)]  # [ways, capacity]
        tokens = jnp.where(used[..., None], x[pair // top_k], 0)  # [ways, capacity, D]
        tokens = send(tokens).reshape(ways * capacity, -1)  # [ways * capacity, D]
        expert = send(jnp.where(used, experts[pair] % num_local, num_local)).reshape(-1)
        token = jnp.arange(expert.size)
        results = grouped_mlps(tokens, token, expert, kernels)
        results = send(results.reshape(ways, capacity, -1))  # [ways, capacity, D]
        return outputs.at[jnp.where(used, pair, num_pairs)].set(results, mode='drop')

    def next_round(outputs: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        take = jax.checkpoint(functools.partial(take_round, first))
        return jax.lax.cond(first < largest_count, take, lambda outputs: outputs, outputs), None

    outputs = take_round(0, jnp.zeros((num_pairs, x.shape[-1]), x.dtype))
    if capacity < worst:
        firsts = jnp.arange(capacity, worst, capacity)
        outputs, _ = jax.lax.scan(next_round, outputs, firsts)
    return outputs
