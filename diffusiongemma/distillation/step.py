"""The distillation step: batch -> encode -> objective -> gradients -> update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.losses import before, mean_weights, over_positions
from diffusiongemma.distillation.microbatches import in_microbatches
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

Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """What the denoise pass is trained on."""

    @property
    def num_steps(self) -> int:
        """Denoise steps of a canvas that are trained together."""
        ...

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        """All that chance decides in a step, and what is counted over its whole batch.

        Args:
          key: of the noise.
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
        """What some rows of a batch add to the loss of the denoise pass.

        Args:
          model: a DiffusionGemma.
          params: all its parameters.
          draw: those rows of what `draw` gave.
          batch: those rows of the batch.
          prefix: the clean rows, encoded.
          teacher: p_T on the clean rows, [B, L]; at i that of token i + 1.

        Returns:
          The loss [] in nats per token, and metrics; of all rows together or, added up, of parts.
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


class Rows(NamedTuple):
    """What a step computes row by row; leaves [B, ...].

    Attributes:
      batch: a packed batch.
      draw: what `Objective.draw` gave for it.
      targets: [B, L] float32, weights of the places before a target token (`mean_weights`).
    """

    batch: Batch
    draw: Any
    targets: jax.Array


def draw_rows(objective: Objective, key: jax.Array, batch: Batch) -> Rows:
    """The rows of a whole batch, with all that chance decides."""
    targets = mean_weights(before(batch['target_mask']))
    return Rows(batch, objective.draw(key, batch), targets)


@jax.named_scope('encode')
def causal_pass(model: Gemma, params: Params, batch: Batch) -> tuple[jax.Array, Prefix]:
    """Hidden states [B, L, D] of the clean rows, and the rows as a prefix for canvases."""
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
    """What the teacher says: from the batch, from the student's encode pass, or from its own.

    Args:
      model: the student.
      teacher: the AR Gemma.
      params: all parameters of the student.
      constants: with the teacher's parameters where its own pass is needed.
      batch: a packed batch.
      hidden: [B, L, D], of the student's encode pass.
    """
    if 'teacher_ids' in batch:
        names = ('teacher_ids', 'teacher_log_probs', 'teacher_log_rest')
        said = TopKDistribution(*(batch[name] for name in names))
        return TeacherStates(said, lambda said: said, jax.lax.stop_gradient(hidden))
    module: Gemma
    if model.config.has_frozen_encoder:
        module, weights, said_in = model, params, hidden
    else:
        assert constants.teacher is not None
        module, weights = teacher, constants.teacher
        said_in, _ = causal_pass(teacher, weights, batch)

    def read(hidden: jax.Array) -> FullDistribution:
        logits = module.apply({'params': weights}, hidden, method='unembed')
        return FullDistribution(jax.lax.stop_gradient(logits))

    said_in, hidden = jax.lax.stop_gradient((said_in, hidden))
    return TeacherStates(said_in, read, hidden)


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
    """The objective plus ar_weight * KL(p_T || a_S), which keeps the encode pass at the teacher.

    Args:
      model: a DiffusionGemma; a_S are its causal logits.
      teacher: the AR Gemma.
      objective: of the denoise pass.
      ar_weight: weight of the causal KL.
      constants: the frozen part of the student's parameters, and the teacher's.
      params: the trained part.
      rows: of a batch (`draw_rows`), all or some.
      combine: how the parts make the whole.

    Returns:
      The loss [] and metrics; of some rows, their share in those of the batch.
    """
    if combine is join_parts:
        params = kernels_in_compute_dtype(model, params)
    params = combine(constants.student, params)
    hidden, prefix = causal_pass(model, params, rows.batch)
    said = teacher_states(model, teacher, params, constants, rows.batch, hidden)
    ar_kl = jnp.zeros(())
    if not model.config.has_frozen_encoder:

        def kl(hidden: jax.Array, values: Any) -> jax.Array:
            logits = model.apply({'params': params}, hidden, method='unembed')
            return said.read(values).kl(logits)

        chunk = model.execution.logits_chunk
        ar_kl = over_positions(kl, chunk, rows.targets.shape, hidden, said.values)
        ar_kl = jnp.sum(ar_kl * rows.targets)
    denoise, metrics = objective.loss(model, params, rows.draw, rows.batch, prefix, said)
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
    """The train step: (state, constants, batch) -> (state, metrics).

    The noise of a step depends on `seed` and the step alone, so that a resumed run draws
    what an uninterrupted one would have drawn. In how many microbatches a batch is computed
    changes the memory that it takes, and nothing else.
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
