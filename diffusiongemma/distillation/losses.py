"""Losses of teacher training and of Diffuse-Distill, all in float32.

Notation of the design: p_T teacher conditionals on clean text, q_S denoiser, a_S the
student's causal logits, t noise level.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[labels] in nats: [..., V], [...] int32 -> [...] float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def kl_divergence(target_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(softmax(target_logits) || softmax(logits)) in nats: [..., V] twice -> [...]."""
    target = jax.nn.log_softmax(target_logits.astype(jnp.float32), axis=-1)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1)


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
    teacher_logits: jax.Array, logits: jax.Array, target_mask: jax.Array
) -> jax.Array:
    """Mean KL(p_T || a_S) over the positions that predict target tokens; [B, L, V] twice."""
    return masked_mean(kl_divergence(teacher_logits[:, :-1], logits[:, :-1]), target_mask[:, 1:])


def denoise_loss(
    logits: jax.Array,
    canvas: jax.Array,
    teacher_logits: jax.Array,
    kl_weight: jax.Array,
) -> jax.Array:
    """(1 - w) CE(x | q_S) + w KL(p_T || q_S) for each canvas position.

    Args:
      logits: [B, N, C, V] denoiser logits on the noisy canvases.
      canvas: [B, N, C] int32 clean tokens.
      teacher_logits: [B, N, C, V] causal teacher logits for the same tokens.
      kl_weight: [B, N, C] float32 w in [0, 1].

    Returns:
      [B, N, C] float32.
    """
    hard = cross_entropy(logits, canvas)
    soft = kl_divergence(teacher_logits, logits)
    return (1.0 - kl_weight) * hard + kl_weight * soft
