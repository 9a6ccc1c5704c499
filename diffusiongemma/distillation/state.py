"""Training state, optimizer and EMA."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from diffusiongemma.errors import check_range
from diffusiongemma.models.weights import weight_at

NAMES = ('adamw', 'adafactor', 'muon')
ROUTER = 'router'


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with linear warm-up, cosine decay and global-norm clipping.

    Attributes:
      name: 'adamw', with two moments of every parameter; 'adafactor', with one number for each row
        and each column of a matrix (`optax.scale_by_factored_rms`) and updates clipped to a root
        mean square of 1; or 'muon' (`optax.contrib.muon`), which orthogonalizes one moment of the
        kernels of layers and experts, with AdamW without decay for all other parameters. The
        updates of all three have about the same size, so learning rates are comparable.
      learning_rate: the peak learning rate.
      warmup_steps: the number of steps of linear warm-up from 0.
      final_learning_rate_fraction: the fraction of the peak at which the cosine ends.
      weight_decay: decoupled weight decay, only on matrices (not on norms, scales and scalars).
      b1, b2: Adam moment decays; Muon's moment decays with `b2`, Adafactor ignores both.
      clip_norm: the maximum global norm of the gradient.
      average: True keeps an exponential moving average (EMA) of the parameters, which is evaluated
        and exported. False saves four bytes per parameter; the parameters themselves are then
        evaluated and exported.
      ema_decay: the decay of the average; after step n it is at most (1 + n) / (10 + n).
      freeze_router: whether routers of experts are frozen; they then have no moments.
    """

    name: str = 'adamw'
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.05
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    average: bool = True
    ema_decay: float = 0.999
    freeze_router: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f'name must be one of {NAMES}, got {self.name!r}.')
        for name in ('learning_rate', 'clip_norm'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be a number > 0, got {getattr(self, name)}.')
        check_range('warmup_steps', self.warmup_steps, 0)
        check_range('weight_decay', self.weight_decay, 0)
        check_range('final_learning_rate_fraction', self.final_learning_rate_fraction, 0, 1)
        for name in ('b1', 'b2', 'ema_decay'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name} must be in [0, 1), got {getattr(self, name)}.')


@flax.struct.dataclass
class TrainState:
    """The state that a training step updates.

    Attributes:
      step: [] int32, the number of completed optimizer steps.
      params: float32 master weights.
      ema_params: their exponential moving average; None if none is kept.
      opt_state: the state of the optax optimizer.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    @property
    def evaluated_params(self) -> Any:
        """Returns the parameters that are evaluated and exported: their average if there is one."""
        return self.params if self.ema_params is None else self.ema_params


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns a schedule with warm-up and cosine decay over `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, max(num_steps - 1, 1)),
        decay_steps=max(num_steps, 2),  # one step of warm-up, and at least one after it
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of `config` for a run of `num_steps`."""
    update = _UPDATES[config.name](config, learning_rate_schedule(config, num_steps))
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    if not config.freeze_router:
        return optimizer
    return optax.partition({'trained': optimizer, 'frozen': optax.set_to_zero()}, _frozen_routers)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_matrices
    )


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    # Like `optax.adafactor`, but with the weight decay of AdamW (times the learning rate).
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, _matrices),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(
        schedule,
        beta=config.b2,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_kernel_axes,
        consistent_rms=0.2,  # the size of AdamW's updates (arXiv:2502.16982)
    )


_UPDATES = {'adamw': _adamw, 'adafactor': _adafactor, 'muon': _muon}


def _matrices(params: Any) -> Any:
    """Returns the mask of weight decay: all parameters except norm scales and layer scalars."""

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        return 'scale' not in path[-1].key and 'scalar' not in path[-1].key

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _kernel_axes(params: Any) -> Any:
    """Returns the input and output axes of each kernel after stacked axes; None for others."""

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        weight = weight_at([getattr(key, 'key', '') for key in path])
        if weight is None or not weight.large:
            return None
        outputs = tuple(range(leaf.ndim - len(weight.outputs), leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(weight.input_axes(leaf.ndim), outputs)

    return jax.tree_util.tree_map_with_path(axes, params)


def _frozen_routers(params: Any) -> Any:
    def label(path: tuple[Any, ...], leaf: Any) -> str:
        return 'frozen' if any(getattr(key, 'key', '') == ROUTER for key in path) else 'trained'

    return jax.tree_util.tree_map_with_path(label, params)


def create_state(
    params: Any, optimizer: optax.GradientTransformation, *, average: bool = True
) -> TrainState:
    """Returns a state at step 0 whose EMA, if any, equals the parameters, both cast to float32."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params) if average else None,
        opt_state=optimizer.init(params),
    )


def apply_gradients(
    state: TrainState,
    grads: Any,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Returns the state after one update of the parameters and, if there is one, of their EMA."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema_params = state.ema_params
    if ema_params is not None:
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        ema_params = optax.incremental_update(params, ema_params, 1.0 - decay)
    return TrainState(step=step, params=params, ema_params=ema_params, opt_state=opt_state)
