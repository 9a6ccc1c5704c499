"""Mixture of experts: a float32 top-k router and grouped matmuls without dropped tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.config import MoEConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.expert_parallel import experts_on_mesh, routed_mlps
from diffusiongemma.models.kernels.grouped import mlps_by_blocks, warn_of_fallback
from diffusiongemma.models.layers import (
    as_operand,
    is_quantized,
    kernel_init,
    rms_normalize,
    weight,
)


class Router(nn.Module):
    """A router that computes top-k routing weights in float32.

    The weights are the softmax over E of (rmsnorm(a) * scale * D^-1/2) Wr; the k largest are
    renormalized to sum to one and then multiplied by a learned scale per expert (Gemma 4).
    """

    width: int
    config: MoEConfig
    norm_eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns weights [..., k] float32 and experts [..., k] int32 for inputs [..., D]."""
        d, num_experts = self.width, self.config.num_experts
        ones = nn.initializers.ones
        scale = weight(self, 'router/scale', ones, (d,))
        # The factor D^-1/2 is in its inputs, so its initial values have unit variance.
        kernel = weight(self, 'router/kernel', kernel_init(1), (d, num_experts))
        expert_scale = weight(self, 'router/per_expert_scale', ones, (num_experts,))
        hidden = rms_normalize(x, self.norm_eps) * scale * d**-0.5
        probs = jax.nn.softmax(hidden @ kernel, axis=-1)  # [..., E]
        weights, experts = jax.lax.top_k(probs, self.config.top_k)  # [..., k]
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return weights * expert_scale[experts], experts


class Experts(nn.Module):
    """Gated expert MLPs, computed as grouped matmuls over tokens sorted by expert."""

    width: int
    config: MoEConfig
    dtype: jnp.dtype
    execution: Execution = Execution()

    def setup(self) -> None:
        e, d, f = self.config.num_experts, self.width, self.config.expert_width
        self.gate = weight(self, 'experts/gate', kernel_init(d), (e, d, f), self.execution)
        self.up = weight(self, 'experts/up', kernel_init(d), (e, d, f), self.execution)
        self.down = weight(self, 'experts/down', kernel_init(f), (e, f, d), self.execution)

    def __call__(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """Returns outputs [B, M, T, D] for x [B, M, T, D], weights and expert ids [B, M, T, k]."""
        kernels = tuple(
            as_operand(kernel, self.dtype) for kernel in (self.gate, self.up, self.down)
        )
        if not is_quantized(kernels[0]):

            def of(array: jax.Array) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(array.shape, array.dtype)

            warn_of_fallback(of(x.reshape(-1, self.width)), of(kernels[0]), self.execution.platform)
        if self.execution.mesh is not None:
            if self.execution.output_major:
                kernels = tuple(kernel.swapaxes(1, 2) for kernel in kernels)  # [E, in, out]
            return experts_on_mesh(x, weights, experts, kernels, self.execution)
        flat = x.reshape(-1, self.width)  # [t, D]
        if not self.execution.output_major:
            top_k = experts.shape[-1]
            args = (flat, weights.reshape(-1, top_k), experts.reshape(-1, top_k), kernels)
            return routed_mlps(*args, every=True).astype(self.dtype).reshape(x.shape)
        token = jnp.arange(experts.size) // experts.shape[-1]  # [t * k], the token of each pair
        outputs = mlps_by_blocks(flat, token, experts.reshape(-1), kernels)
        outputs = outputs.reshape(*experts.shape, self.width)  # [B, M, T, k, D]
        return jnp.einsum('bmtkd,bmtk->bmtd', outputs, weights.astype(self.dtype))


class MoE(nn.Module):
    """The routed experts of one layer; the router reads the residual, the experts its norm."""

    width: int
    config: MoEConfig
    norm_eps: float
    dtype: jnp.dtype
    execution: Execution = Execution()

    def setup(self) -> None:
        self.router = Router(self.width, self.config, self.norm_eps)
        self.experts = Experts(self.width, self.config, self.dtype, self.execution)

    def __call__(self, residual: jax.Array, normed: jax.Array) -> jax.Array:
        """Returns [B, M, T, D] for the residual, which the router reads, and its normed values."""
        return self.experts(normed, *self.router(residual))
