"""Mixture of experts: float32 top-k router and grouped matmuls, no token dropped."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.config import MoEConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.expert_parallel import experts_on_mesh, grouped_mlps
from diffusiongemma.models.layers import (
    as_operand,
    kernel_init,
    logical_param,
    rms_normalize,
)


class Router(nn.Module):
    """Top-k routing weights in float32.

    softmax over E of (rmsnorm(a) * scale * D^-1/2) Wr; the k largest are renormalised to
    sum to one, then multiplied by a learned scale of their expert (Gemma 4).
    """

    width: int
    config: MoEConfig
    norm_eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., D] -> (weights [..., k] float32, experts [..., k] int32)."""
        d, num_experts = self.width, self.config.num_experts
        scale = logical_param(self, 'scale', nn.initializers.ones, (d,), ('norm',))
        kernel = logical_param(
            self, 'kernel', kernel_init(1), (d, num_experts), ('embed', 'router_experts')
        )
        expert_scale = logical_param(
            self, 'per_expert_scale', nn.initializers.ones, (num_experts,), ('router_experts',)
        )
        hidden = rms_normalize(x, self.norm_eps) * scale * d**-0.5
        probs = jax.nn.softmax(hidden @ kernel, axis=-1)  # [..., E]
        weights, experts = jax.lax.top_k(probs, self.config.top_k)
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return weights * expert_scale[experts], experts


class Experts(nn.Module):
    """Gated expert MLPs as grouped matmuls over tokens sorted by expert."""

    width: int
    config: MoEConfig
    dtype: jnp.dtype
    execution: Execution = Execution()

    def setup(self):
        d, f, e = self.width, self.config.expert_width, self.config.num_experts
        axes_in, axes_out = ('experts', 'embed', 'expert_mlp'), ('experts', 'expert_mlp', 'embed')
        self.gate = logical_param(self, 'gate', kernel_init(d), (e, d, f), axes_in)
        self.up = logical_param(self, 'up', kernel_init(d), (e, d, f), axes_in)
        self.down = logical_param(self, 'down', kernel_init(f), (e, f, d), axes_out)

    def __call__(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """x [B, M, T, D], routing weights and expert ids [B, M, T, k] -> [B, M, T, D]."""
        kernels = tuple(
            as_operand(kernel, self.dtype) for kernel in (self.gate, self.up, self.down)
        )
        if self.execution.mesh is not None:
            return experts_on_mesh(x, weights, experts, kernels, self.execution)
        token = jnp.arange(experts.size) // experts.shape[-1]  # of each pair with an expert
        outputs = grouped_mlps(x.reshape(-1, self.width), token, experts.reshape(-1), kernels)
        outputs = outputs.reshape(*experts.shape, self.width)
        return jnp.einsum('bmtkd,bmtk->bmtd', outputs, weights.astype(self.dtype))


class MoE(nn.Module):
    """Routed experts of one layer; the router reads the residual, the experts its norm."""

    width: int
    config: MoEConfig
    norm_eps: float
    dtype: jnp.dtype
    execution: Execution = Execution()

    def setup(self):
        self.router = Router(self.width, self.config, self.norm_eps)
        self.experts = Experts(self.width, self.config, self.dtype, self.execution)

    def __call__(self, residual: jax.Array, normed: jax.Array) -> jax.Array:
        """residual [B, M, T, D] routes, normed [B, M, T, D] is what the experts see."""
        return self.experts(normed, *self.router(residual))
