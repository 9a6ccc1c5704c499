"""The training step of an autoregressive teacher."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.head import score_positions
from diffusiongemma.distillation.losses import before, cross_entropy, mean_weights
from diffusiongemma.distillation.microbatches import in_microbatches
from diffusiongemma.distillation.state import TrainState, apply_gradients
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.transformer import Gemma


def make_ar_train_step(
    model: Gemma,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    microbatches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns a training step with next-token cross-entropy on the response tokens of rows."""

    def loss_fn(params: Params, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables, tokens, weights = {'params': params}, rows['tokens'], rows['target_weights']
        args = (tokens, rows['positions'], rows['segment_ids'])
        hidden, _ = model.apply(variables, *args, method='encode')  # [B, L, D]

        def score(
            params: Params, hidden: jax.Array, following: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({'params': params}, hidden, method='unembed')  # [B, c, V]
            hits = jnp.argmax(logits, axis=-1) == following
            return cross_entropy(logits, following), hits.astype(jnp.float32)

        following = jnp.roll(tokens, -1, axis=1)
        losses, hits = score_positions(score, model, [params], tokens.shape, hidden, following)
        loss = jnp.sum(losses * weights)
        return loss, {'loss': loss, 'token_accuracy': jnp.sum(hits * weights)}

    gradients = in_microbatches(jax.grad(loss_fn, has_aux=True), microbatches)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rows = dict(batch) | {'target_weights': mean_weights(before(batch['target_mask']))}
        grads, metrics = gradients(state.params, rows)
        metrics['gradient_norm'] = optax.global_norm(grads)
        return apply_gradients(state, grads, optimizer, ema_decay), metrics

    return train_step
