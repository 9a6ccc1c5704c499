"""The distillation step: batch -> encode -> objective -> gradients -> update."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.losses import next_token_kl
from diffusiongemma.distillation.state import TrainState, apply_gradients
from diffusiongemma.distillation.teacher import (
    FullDistribution,
    TeacherDistribution,
    TopKDistribution,
)
from diffusiongemma.models.cache import Prefix

Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """What the denoise pass is trained on."""

    def loss(
        self,
        model: nn.Module,
        params: dict,
        key: jax.Array,
        batch: Batch,
        prefix: Prefix,
        teacher: TeacherDistribution,
    ) -> tuple[jax.Array, Metrics]:
        """The loss of the denoise pass on one batch.

        Args:
          model: a DiffusionGemma.
          params: all its parameters.
          key: of the noise.
          batch: a packed batch (`data.packing`).
          prefix: the clean rows, encoded.
          teacher: p_T on the clean rows, [B, L]; at i that of token i + 1.

        Returns:
          The loss [] in nats per token, and metrics.
        """
        ...


# All parameters of the student from its frozen and its trained part.
Combine = Callable[[dict, Any], dict]


def join_parts(frozen: dict, trained: dict) -> dict:
    """The parts are different parameters."""
    return frozen | trained


class Constants(NamedTuple):
    """Parameters that a step reads and never changes.

    Attributes:
      teacher: the AR teacher's, or None where no pass of its own is needed: the student's encode
        pass is frozen and serves as one, or the batches hold what the teacher said.
      student: the frozen part of the student's (`student.frozen_params`).
    """

    teacher: dict | None
    student: dict


def causal_pass(model: nn.Module, params: dict, batch: Batch) -> tuple[jax.Array, Prefix]:
    """Causal logits [B, L, V] of the clean rows, and the rows as a prefix for canvases."""
    variables = {'params': params}
    positions, segment_ids = batch['positions'], batch['segment_ids']
    hidden, kv = model.apply(variables, batch['tokens'], positions, segment_ids, method='encode')
    logits = model.apply(variables, hidden, method='unembed')
    return logits, Prefix(kv, positions, segment_ids)


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    ar_weight: float,
    params: dict,
    constants: Constants,
    key: jax.Array,
    batch: Batch,
    combine: Combine = join_parts,
) -> tuple[jax.Array, Metrics]:
    """The objective plus ar_weight * KL(p_T || a_S), which keeps the encode pass at the teacher.

    Args:
      model: a DiffusionGemma.
      teacher: the AR Gemma.
      objective: of the denoise pass.
      ar_weight: weight of the causal KL.
      params: the trained part of the student's parameters.
      constants: the rest, and the teacher's.
      key: of the noise.
      batch: a packed batch.
      combine: how the parts make the whole.

    Returns:
      The loss [] and metrics.
    """
    params = combine(constants.student, params)
    ar_logits, prefix = causal_pass(model, params, batch)
    encodes_as_teacher = model.config.separate_denoiser  # its encode pass is frozen
    if 'teacher_ids' in batch:
        said = TopKDistribution(
            batch['teacher_ids'], batch['teacher_log_probs'], batch['teacher_log_rest']
        )
    elif encodes_as_teacher:
        said = FullDistribution(jax.lax.stop_gradient(ar_logits))
    else:
        said = FullDistribution(causal_pass(teacher, constants.teacher, batch)[0])
    ar_kl = jnp.zeros(())
    if not encodes_as_teacher:
        ar_kl = next_token_kl(said, ar_logits, batch['target_mask'])
    denoise, metrics = objective.loss(model, params, key, batch, prefix, said)
    loss = denoise + ar_weight * ar_kl
    return loss, {'loss': loss, 'loss/denoise': denoise, 'loss/encode': ar_kl} | metrics


def make_distillation_step(
    model: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ar_weight: float,
    ema_decay: float,
    seed: int,
    combine: Combine = join_parts,
) -> Callable[[TrainState, Constants, Batch], tuple[TrainState, Metrics]]:
    """The train step: (state, constants, batch) -> (state, metrics).

    The noise of a step depends on `seed` and the step alone, so that a resumed run draws
    what an uninterrupted one would have drawn.
    """

    def train_step(
        state: TrainState, constants: Constants, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
            return distillation_loss(
                model, teacher, objective, ar_weight, params, constants, key, batch, combine
            )

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        metrics['gradient_norm'] = optax.global_norm(grads)
        return apply_gradients(state, grads, optimizer, ema_decay), metrics

    return train_step
