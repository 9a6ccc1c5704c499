"""Training state, optimizer and EMA."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and global-norm clipping.

    Attributes:
      learning_rate: peak.
      warmup_steps: steps of linear warm-up from 0.
      final_learning_rate_fraction: the cosine ends at this share of the peak.
      weight_decay: decoupled, on matrices only (not on norms, scales and scalars).
      b1, b2: Adam moment decays.
      clip_norm: maximum global norm of the gradient.
      ema_decay: decay of the parameter average; it is ramped up as (1 + n) / (10 + n).
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.05
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f'learning_rate must be > 0, got {self.learning_rate}.')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f'ema_decay must lie in [0, 1), got {self.ema_decay}.')


@flax.struct.dataclass
class TrainState:
    """Everything a training step reads and writes.

    Attributes:
      step: [] int32, optimizer steps done.
      params: float32 masters.
      ema_params: their exponential moving average; what is evaluated and exported.
      opt_state: optax state.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Warm-up and cosine decay over `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, max(num_steps - 1, 1)),
        decay_steps=max(num_steps, 2),  # one step of warm-up, and at least one after it
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of `config` for a run of `num_steps`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params),
        ),
    )


def _is_matrix(path: tuple, leaf: Any) -> bool:
    """Norm scales and layer scalars are not decayed, stacked over layers or not."""
    return 'scale' not in path[-1].key and 'scalar' not in path[-1].key


def create_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 whose EMA equals the parameters; both in float32, whatever these are."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def apply_gradients(
    state: TrainState,
    grads: Any,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """One optimizer and EMA update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    ema_params = optax.incremental_update(params, state.ema_params, 1.0 - decay)
    return TrainState(step=step, params=params, ema_params=ema_params, opt_state=opt_state)
