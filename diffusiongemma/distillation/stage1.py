"""Stage 1 of Diffuse-Distill: the AR teacher's knowledge into the denoiser.

L = E_t[ (1 - w) CE(x | q_S(. | x_t, c)) + w KL(p_T(. | x_<i, c) || q_S(. | x_t, c)) ]
    + ar_weight * KL(p_T || a_S)

with w = kd_weight * t on corrupted canvas positions and 0 on kept ones and on padding. All
canvases of a row are trained in one pass: the encode pass runs over the clean row, the
denoise pass over all its noisy canvases side by side.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffusiongemma.diffusion.corruption import Corruption, sample_noise_levels
from diffusiongemma.distillation.losses import denoise_loss, masked_mean, next_token_kl
from diffusiongemma.distillation.state import TrainState, apply_gradients
from diffusiongemma.models.cache import Prefix
from diffusiongemma.sampling.schedule import TemperatureSchedule

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """Weights of the objective.

    Attributes:
      kd_weight: share of the teacher's KL at t = 1 (0 trains on hard labels alone).
      ar_weight: weight of the causal KL that keeps the encode pass at the teacher.
      self_conditioning_rate: probability that a row sees its own first prediction.
      min_noise_level: t is drawn from (min_noise_level, 1).
    """

    kd_weight: float = 1.0
    ar_weight: float = 0.1
    self_conditioning_rate: float = 0.5
    min_noise_level: float = 1e-3

    def __post_init__(self):
        for name in ('kd_weight', 'self_conditioning_rate', 'min_noise_level'):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f'{name} must lie in [0, 1], got {value}.')
        if self.ar_weight < 0:
            raise ValueError(f'ar_weight must be >= 0, got {self.ar_weight}.')


class NoisyCanvases(NamedTuple):
    """What one draw of the noise gives.

    Attributes:
      tokens: [B, N, C] int32 noisy canvases.
      corrupted: [B, N, C] bool.
      noise_level: [B, N] float32.
      self_condition: [B, 1, 1, 1] bool, rows that see their first prediction.
    """

    tokens: jax.Array
    corrupted: jax.Array
    noise_level: jax.Array
    self_condition: jax.Array


def draw_noise(
    key: jax.Array, canvases: jax.Array, corruption: Corruption, config: Stage1Config
) -> NoisyCanvases:
    """Noises clean canvases [B, N, C], each at a level of its own."""
    level_key, noise_key, condition_key = jax.random.split(key, 3)
    noise_level = sample_noise_levels(level_key, canvases.shape[:2], config.min_noise_level)
    noisy, corrupted = corruption.corrupt(noise_key, canvases, noise_level[..., None])
    rate = config.self_conditioning_rate
    self_condition = jax.random.bernoulli(condition_key, rate, (canvases.shape[0], 1, 1, 1))
    return NoisyCanvases(noisy, corrupted, noise_level, self_condition)


def canvas_teacher_logits(teacher_logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Teacher conditionals p_T(x_i | x_<i, c) for every canvas position.

    Args:
      teacher_logits: [B, L, V] causal logits on the clean row.
      batch: a packed batch.

    Returns:
      Logits [B, N, C, V], and [B, N, C] bool: the position is a token of the document.
      Elsewhere (padding after the end, unused slots) the logits mean nothing.
    """
    canvas_length = batch['canvas_tokens'].shape[-1]
    index = batch['canvas_offsets'][..., None] + jnp.arange(canvas_length)  # [B, N, C]
    row_length = batch['tokens'].shape[1]
    clipped = jnp.clip(index, 1, row_length - 1)
    rows = jnp.arange(index.shape[0])[:, None, None]
    same_document = batch['segment_ids'][rows, clipped] == batch['canvas_segment_ids'][..., None]
    used = (batch['canvas_segment_ids'] > 0)[..., None]
    return teacher_logits[rows, clipped - 1], same_document & used & (index < row_length)


def causal_pass(model: nn.Module, params: dict, batch: Batch) -> tuple[jax.Array, Prefix]:
    """Causal logits [B, L, V] of the clean rows, and the rows as a prefix for canvases."""
    variables = {'params': params}
    positions, segment_ids = batch['positions'], batch['segment_ids']
    hidden, kv = model.apply(variables, batch['tokens'], positions, segment_ids, method='encode')
    logits = model.apply(variables, hidden, method='unembed')
    return logits, Prefix(kv, positions, segment_ids)


def denoise_twice(
    model: nn.Module,
    params: dict,
    batch: Batch,
    prefix: Prefix,
    noisy: NoisyCanvases,
    schedule: TemperatureSchedule,
) -> jax.Array:
    """Denoiser logits [B, N, C, V]; rows drawn for it are conditioned on a first pass.

    The first pass takes no gradient. Its logits are shaped by the sampler's temperature at
    the same noise level, as the sampler shapes what it feeds back.
    """
    starts, segment_ids = batch['canvas_starts'], batch['canvas_segment_ids']
    frozen = {'params': jax.lax.stop_gradient(params)}
    first = model.apply(
        frozen, noisy.tokens, starts, segment_ids, jax.lax.stop_gradient(prefix), method='denoise'
    )
    shaped = first / schedule.temperature(noisy.noise_level)[..., None, None]
    soft = model.apply(frozen, shaped, method='soft_embed')  # [B, N, C, D]
    soft = jnp.where(noisy.self_condition, jax.lax.stop_gradient(soft), 0.0)
    return model.apply(
        {'params': params}, noisy.tokens, starts, segment_ids, prefix, soft, method='denoise'
    )


def stage1_loss(
    model: nn.Module,
    params: dict,
    teacher_logits: jax.Array,
    batch: Batch,
    noisy: NoisyCanvases,
    config: Stage1Config,
    schedule: TemperatureSchedule,
) -> tuple[jax.Array, Metrics]:
    """The objective of the module's docstring on one batch.

    Args:
      model: a DiffusionGemma.
      params: its parameters.
      teacher_logits: [B, L, V] causal logits of the frozen teacher on the clean rows.
      batch: a packed batch.
      noisy: one draw of the noise.
      config: weights.
      schedule: the sampler's temperature schedule.

    Returns:
      The loss [] and metrics.
    """
    ar_logits, prefix = causal_pass(model, params, batch)
    ar_kl = next_token_kl(teacher_logits, ar_logits, batch['target_mask'])
    logits = denoise_twice(model, params, batch, prefix, noisy, schedule)

    targets, has_target = canvas_teacher_logits(teacher_logits, batch)
    kl_weight = config.kd_weight * noisy.noise_level[..., None]
    kl_weight = jnp.where(noisy.corrupted & has_target, kl_weight, 0.0)
    canvas = batch['canvas_tokens']
    used = jnp.broadcast_to((batch['canvas_segment_ids'] > 0)[..., None], canvas.shape)
    per_token = denoise_loss(logits, canvas, targets, kl_weight)
    denoise = masked_mean(per_token, used)
    loss = denoise + config.ar_weight * ar_kl
    hits = (jnp.argmax(logits, axis=-1) == canvas).astype(jnp.float32)
    return loss, {
        'loss': loss,
        'loss/denoise': denoise,
        'loss/encode': ar_kl,
        'canvas_accuracy': masked_mean(hits, used & noisy.corrupted),
    }


def make_stage1_step(
    model: nn.Module,
    teacher: nn.Module,
    optimizer: optax.GradientTransformation,
    corruption: Corruption,
    schedule: TemperatureSchedule,
    config: Stage1Config,
    ema_decay: float,
    seed: int,
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, Metrics]]:
    """The train step: (state, frozen teacher parameters, batch) -> (state, metrics).

    The noise of a step depends on `seed` and the step alone, so that a resumed run draws
    what an uninterrupted one would have drawn.
    """

    def train_step(
        state: TrainState, teacher_params: dict, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        noisy = draw_noise(key, batch['canvas_tokens'], corruption, config)
        teacher_logits, _ = causal_pass(teacher, teacher_params, batch)

        def loss_fn(params: dict) -> tuple[jax.Array, Metrics]:
            return stage1_loss(model, params, teacher_logits, batch, noisy, config, schedule)

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        metrics['gradient_norm'] = optax.global_norm(grads)
        return apply_gradients(state, grads, optimizer, ema_decay), metrics

    return train_step


def student_params_from_teacher(student_params: dict, teacher_params: dict) -> dict:
    """Copies the teacher's weights into a freshly initialised student.

    The student's additions keep their initial values, except that each layer's denoise
    scalar starts at its encode scalar, and a separate denoiser at the teacher's layers.

    Raises:
      ValueError: a weight of the teacher is missing in the student or has another shape.
    """
    from flax.traverse_util import flatten_dict, unflatten_dict

    if 'denoise_backbone' in student_params:
        teacher_params = teacher_params | {'denoise_backbone': teacher_params['backbone']}
    student, teacher = flatten_dict(student_params), flatten_dict(teacher_params)
    for path, value in teacher.items():
        have = student[path].shape if path in student else None
        if have != value.shape:
            raise ValueError(
                f'the teacher parameter {"/".join(path)} has shape {value.shape}, the student '
                f'{"has none" if have is None else f"has {have}"}: teacher and student need '
                'the same backbone.'
            )
    merged = student | teacher
    for path in student:
        encode_path = (*path[:-1], 'encode_scalar')
        if path[-1] == 'denoise_scalar' and encode_path in teacher:
            merged[path] = teacher[encode_path]
    return unflatten_dict({path: jnp.array(value) for path, value in merged.items()})
