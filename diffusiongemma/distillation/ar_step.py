"""The training step of an autoregressive teacher."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffusiongemma.distillation.losses import masked_mean, next_token_loss
from diffusiongemma.distillation.state import TrainState, apply_gradients

Batch = dict[str, jax.Array]


def make_ar_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Next-token cross-entropy on the response tokens of packed rows."""

    def loss_fn(params: dict, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {'params': params}
        hidden, _ = model.apply(
            variables, batch['tokens'], batch['positions'], batch['segment_ids'], method='encode'
        )
        logits = model.apply(variables, hidden, method='unembed')  # [B, L, V]
        loss = next_token_loss(logits, batch['tokens'], batch['target_mask'])
        hits = jnp.argmax(logits[:, :-1], axis=-1) == batch['tokens'][:, 1:]
        accuracy = masked_mean(hits.astype(jnp.float32), batch['target_mask'][:, 1:])
        return loss, {'loss': loss, 'token_accuracy': accuracy}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch)
        metrics['gradient_norm'] = optax.global_norm(grads)
        return apply_gradients(state, grads, optimizer, ema_decay), metrics

    return train_step
