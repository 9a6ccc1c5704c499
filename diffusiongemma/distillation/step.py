"""The distillation step: batch -> encode -> objective -> gradients -> update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.head import score_positions
from diffusiongemma.distillation.losses import before, mean_weights
from diffusiongemma.distillation.microbatches import Metrics, in_microbatches
from diffusiongemma.distillation.state import TrainState, apply_gradients
from diffusiongemma.distillation.teacher import (
    FullDistribution,
    TeacherStates,
    TopKDistribution,
)
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.inference import kernels_in_compute_dtype
from diffusiongemma.models.transformer import Gemma


class Objective(Protocol):
    """A training objective of the denoise pass."""

    @property
    def num_steps(self) -> int:
        """Returns the number of denoise steps of a canvas that are trained together."""
        ...

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        """Returns all random choices of a step, and weights that depend on the whole batch.

        Args:
          key: the PRNG key of the step.
          batch: a packed batch (`data.packing`).

        Returns:
          A tree with leaves [B, ...].
        """
        ...

    def loss(
        self,
        model: DiffusionGemma,
        params: Params,
        draw: Any,
        batch: Batch,
        prefix: Prefix,
        teacher: TeacherStates,
    ) -> tuple[jax.Array, Metrics]:
        """Returns the share of some rows of a batch in the loss of the denoise pass.

        Args:
          model: a DiffusionGemma.
          params: all parameters of the model.
          draw: the result of `draw` for these rows.
          batch: these rows of the batch.
          prefix: the encoded clean rows.
          teacher: p_T on the clean rows, [B, L]; index i has the distribution of token i + 1.

        Returns:
          The loss [] in nats per token, and metrics; both add up over the parts of a batch to the
          values of the whole batch.
        """
        ...


# Combines the frozen and the trained part of the student's parameters.
Combine = Callable[[Params, Any], Params]


def join_parts(frozen: Params, trained: Params) -> Params:
    """Returns all parameters if the two parts have different parameters."""
    return frozen | trained


class Constants(NamedTuple):
    """The parameters that a step reads and never changes.

    Attributes:
      teacher: the parameters of the AR teacher, or None if it needs no separate pass: the student's
        frozen encode pass serves as the teacher, or the batches contain the teacher's
        distributions.
      student: the frozen part of the student's parameters (`student.frozen_params`).
    """

    teacher: Params | None
    student: Params


class Rows(NamedTuple):
    """The inputs of a step that can be split by rows; leaves [B, ...].

    Attributes:
      batch: a packed batch.
      draw: the result of `Objective.draw` for the batch.
      targets: [B, L] float32, weights of the positions before a target token (`mean_weights`).
    """

    batch: Batch
    draw: Any
    targets: jax.Array


def draw_rows(objective: Objective, key: jax.Array, batch: Batch) -> Rows:
    """Returns the rows of a whole batch, with all random choices of the step."""
    targets = mean_weights(before(batch['target_mask']))
    return Rows(batch, objective.draw(key, batch), targets)


@jax.named_scope('encode')
def causal_pass(model: Gemma, params: Params, batch: Batch) -> tuple[jax.Array, Prefix]:
    """Returns hidden states [B, L, D] of the clean rows, and the rows as a prefix for canvases."""
    positions, segment_ids = batch['positions'], batch['segment_ids']
    args = (batch['tokens'], positions, segment_ids)
    hidden, kv = model.apply({'params': params}, *args, method='encode')
    return hidden, Prefix(kv, positions, segment_ids)


def teacher_states(
    model: DiffusionGemma,
    teacher: Gemma,
    params: Params,
    constants: Constants,
    batch: Batch,
    hidden: jax.Array,
) -> TeacherStates:
    """Returns the teacher's distributions, from the batch, the encode pass or a teacher pass.

    Args:
      model: the student.
      teacher: the AR Gemma.
      params: all parameters of the student.
      constants: the frozen parameters, including the teacher's if it needs a separate pass.
      batch: a packed batch.
      hidden: [B, L, D], hidden states of the student's encode pass.
    """
    if 'teacher_ids' in batch:
        names = ('teacher_ids', 'teacher_log_probs', 'teacher_log_rest')
        stored = TopKDistribution(*(batch[name] for name in names))
        return TeacherStates(stored, lambda values, _=None: values, jax.lax.stop_gradient(hidden))
    module: Gemma
    if model.config.has_frozen_encoder:
        module, weights, teacher_hidden = model, params, hidden
    else:
        assert constants.teacher is not None
        module, weights = teacher, constants.teacher
        teacher_hidden, _ = causal_pass(teacher, weights, batch)

    def read(hidden: jax.Array, weights: Params = weights) -> FullDistribution:
        logits = module.apply({'params': weights}, hidden, method='unembed')
        return FullDistribution(jax.lax.stop_gradient(logits))

    teacher_hidden, hidden = jax.lax.stop_gradient((teacher_hidden, hidden))
    return TeacherStates(teacher_hidden, read, hidden, weights)


def distillation_loss(
    model: DiffusionGemma,
    teacher: Gemma,
    objective: Objective,
    ar_weight: float,
    constants: Constants,
    params: Params,
    rows: Rows,
    combine: Combine = join_parts,
) -> tuple[jax.Array, Metrics]:
    """Returns the objective plus ar_weight * KL(p_T || a_S), which keeps a_S close to the teacher.

    Args:
      model: a DiffusionGemma; a_S are its causal logits.
      teacher: the AR Gemma.
      objective: the objective of the denoise pass.
      ar_weight: the weight of the causal KL.
      params: the trained part of the student's parameters.
      constants: the frozen part, and the teacher's parameters.
      rows: all or some rows of a batch (`draw_rows`).
      combine: the function that combines frozen and trained parameters.

    Returns:
      The loss [] and metrics; both add up over the parts of a batch to the values of the whole
      batch.
    """
    if combine is join_parts:
        params = kernels_in_compute_dtype(model, params)
    params = combine(constants.student, params)
    hidden, prefix = causal_pass(model, params, rows.batch)
    states = teacher_states(model, teacher, params, constants, rows.batch, hidden)
    ar_kl = jnp.zeros(())
    if not model.config.has_frozen_encoder:

        def kl(params: Params, weights: Params, hidden: jax.Array, values: Any) -> jax.Array:
            logits = model.apply({'params': params}, hidden, method='unembed')  # [B, c, V]
            return states.read(values, weights).kl(logits)

        read, shape = (params, states.params), rows.targets.shape
        ar_kl = score_positions(kl, model, read, shape, hidden, states.values)  # [B, L]
        ar_kl = jnp.sum(ar_kl * rows.targets)
    denoise, metrics = objective.loss(model, params, rows.draw, rows.batch, prefix, states)
    loss = denoise + ar_weight * ar_kl
    return loss, {'loss': loss, 'loss/denoise': denoise, 'loss/encode': ar_kl} | metrics


def make_distillation_step(
    model: DiffusionGemma,
    teacher: Gemma,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ar_weight: float,
    ema_decay: float,
    seed: int,
    microbatches: int = 1,
    combine: Combine = join_parts,
) -> Callable[[TrainState, Constants, Batch], tuple[TrainState, Metrics]]:
    """Returns the train step: (state, constants, batch) -> (state, metrics).

    The noise of a step only depends on `seed` and the step number, so a resumed run draws the same
    noise as an uninterrupted one. The number of microbatches only affects memory.
    """

    def train_step(
        state: TrainState, constants: Constants, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss = functools.partial(
            distillation_loss, model, teacher, objective, ar_weight, constants, combine=combine
        )
        gradients = in_microbatches(jax.grad(loss, has_aux=True), microbatches)
        grads, metrics = gradients(state.params, draw_rows(objective, key, batch))
        metrics['gradient_norm'] = optax.global_norm(grads)
        return apply_gradients(state, grads, optimizer, ema_decay), metrics

    return train_step
