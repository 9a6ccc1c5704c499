"""Mixture of experts: float32 top-k router and grouped matmuls, no token dropped."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.config import MoEConfig
from diffusiongemma.models.grouped import grouped_matmul
from diffusiongemma.models.layers import kernel_init, logical_param, rms_normalize


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
        """[T, D] -> (weights [T, k] float32, experts [T, k] int32)."""
        d, num_experts = self.width, self.config.num_experts
        scale = logical_param(self, 'scale', nn.initializers.ones, (d,), ('norm',))
        kernel = logical_param(
            self, 'kernel', kernel_init(1), (d, num_experts), ('embed', 'router_experts')
        )
        expert_scale = logical_param(
            self, 'per_expert_scale', nn.initializers.ones, (num_experts,), ('router_experts',)
        )
        hidden = rms_normalize(x, self.norm_eps) * scale * d**-0.5
        probs = jax.nn.softmax(hidden @ kernel, axis=-1)  # [T, E]
        weights, experts = jax.lax.top_k(probs, self.config.top_k)
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return weights * expert_scale[experts], experts


class Experts(nn.Module):
    """Gated expert MLPs as grouped matmuls over tokens sorted by expert."""

    width: int
    config: MoEConfig
    dtype: jnp.dtype

    def setup(self):
        d, f, e = self.width, self.config.expert_width, self.config.num_experts
        axes_in, axes_out = ('experts', 'embed', 'expert_mlp'), ('experts', 'expert_mlp', 'embed')
        self.gate = logical_param(self, 'gate', kernel_init(d), (e, d, f), axes_in)
        self.up = logical_param(self, 'up', kernel_init(d), (e, d, f), axes_in)
        self.down = logical_param(self, 'down', kernel_init(f), (e, f, d), axes_out)

    def __call__(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """x [T, D], routing weights and expert ids [T, k] -> [T, D]."""
        num_tokens, top_k = experts.shape
        flat = experts.reshape(-1)  # [T * k]
        order = jnp.argsort(flat)  # stable: tokens of one expert stay in order
        group_sizes = jnp.bincount(flat, length=self.config.num_experts).astype(jnp.int32)
        inputs = x[order // top_k]  # [T * k, D]
        gate = grouped_matmul(inputs, self.gate.astype(self.dtype), group_sizes)
        up = grouped_matmul(inputs, self.up.astype(self.dtype), group_sizes)
        hidden = (nn.gelu(gate, approximate=True) * up).astype(self.dtype)
        outputs = grouped_matmul(hidden, self.down.astype(self.dtype), group_sizes)
        outputs = jnp.zeros_like(outputs).at[order].set(outputs)  # back to token order
        outputs = outputs.reshape(num_tokens, top_k, -1)
        return jnp.einsum('tkd,tk->td', outputs, weights).astype(self.dtype)


class MoE(nn.Module):
    """Routed experts of one layer; the router reads the residual, the experts its norm."""

    width: int
    config: MoEConfig
    norm_eps: float
    dtype: jnp.dtype

    def setup(self):
        self.router = Router(self.width, self.config, self.norm_eps)
        self.experts = Experts(self.width, self.config, self.dtype)

    def __call__(self, residual: jax.Array, normed: jax.Array) -> jax.Array:
        """residual [..., D] routes, normed [..., D] is what the experts see; [..., D]."""
        weights, experts = self.router(residual.reshape(-1, self.width))
        outputs = self.experts(normed.reshape(-1, self.width), weights, experts)
        return outputs.reshape(normed.shape)
