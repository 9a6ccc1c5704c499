"""Losses of teacher training and of Diffuse-Distill, all in float32.

Notation of the design: p_T teacher conditionals on clean text, q_S denoiser, a_S the
student's causal logits, t noise level.
"""

import jax
import jax.numpy as jnp

from diffusiongemma.distillation.teacher import TeacherDistribution


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[labels] in nats: [..., V], [...] int32 -> [...] float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask`; 0 where nothing is masked in."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def next_token_loss(logits: jax.Array, tokens: jax.Array, target_mask: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy over the target tokens.

    Args:
      logits: [B, L, V] causal logits; those at i predict token i + 1.
      tokens: [B, L] int32.
      target_mask: [B, L] bool, tokens to be predicted; never a document's first token.
    """
    return masked_mean(cross_entropy(logits[:, :-1], tokens[:, 1:]), target_mask[:, 1:])


def next_token_kl(
    teacher: TeacherDistribution, logits: jax.Array, target_mask: jax.Array
) -> jax.Array:
    """Mean KL(p_T || a_S) over the places [B, L] that predict target tokens; logits [B, L, V]."""
    before_target = jnp.roll(target_mask, -1, axis=1)  # a row's first token is never a target
    return masked_mean(teacher.kl(logits), before_target)


def denoise_loss(
    logits: jax.Array,
    canvas: jax.Array,
    teacher: TeacherDistribution,
    kl_weight: jax.Array,
) -> jax.Array:
    """(1 - w) CE(x | q_S) + w KL(p_T || q_S) for each canvas position.

    Args:
      logits: [B, N, C, V] denoiser logits on the noisy canvases.
      canvas: [B, N, C] int32 clean tokens.
      teacher: p_T of the same tokens, [B, N, C].
      kl_weight: [B, N, C] float32 w in [0, 1].

    Returns:
      [B, N, C] float32.
    """
    hard = cross_entropy(logits, canvas)
    soft = teacher.kl(logits)
    return (1.0 - kl_weight) * hard + kl_weight * soft
