"""Stage 1 of Diffuse-Distill: adapts the AR model to denoise.

L = E_t[ (1 - w) CE(x | q_S(. | x_t, c)) + w KL(p_T(. | x_<i, c) || q_S(. | x_t, c)) ]

with w = kd_weight * t at corrupted positions (`canvases.kl_weights`). All canvases of a row are
trained in one pass: the encode pass runs over the clean row, and the denoise pass over all of its
noisy canvases side by side.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusiongemma.diffusion.corruption import Corruption
from diffusiongemma.distillation import canvases
from diffusiongemma.distillation.canvases import Batch, NoisyCanvases
from diffusiongemma.distillation.head import score_positions
from diffusiongemma.distillation.losses import TokenLoss, denoise_loss, mean_weights
from diffusiongemma.distillation.teacher import TeacherStates
from diffusiongemma.errors import check_range
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.sampling.rules import read_value
from diffusiongemma.sampling.schedule import TemperatureSchedule


class Draw(NamedTuple):
    """The random choices of a step, and weights that turn sums over positions into means.

    Attributes:
      noisy: the noisy canvases.
      conditioned: [B, 1, 1, 1] bool, rows with self-conditioning on a first prediction.
      used: [B, N, C] float32, weights of the used positions.
      corrupted: [B, N, C] float32, weights of the used positions that are corrupted.
    """

    noisy: NoisyCanvases
    conditioned: jax.Array
    used: jax.Array
    corrupted: jax.Array


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """The settings of stage 1 (`config.stage1`).

    Attributes:
      kd_weight: the weight of the teacher's KL at t = 1; 0 trains only on hard labels.
      self_conditioning_rate: the probability that a row is conditioned on its first prediction.
      min_noise_level: the lowest noise level; t is drawn from (min_noise_level, 1).
      token_loss: a `TokenLoss` that replaces the loss of a position, or its text, such as
        'my_losses.Focal(gamma=2)'.
    """

    kd_weight: float = 1.0
    self_conditioning_rate: float = 0.5
    min_noise_level: float = 1e-3
    token_loss: str | TokenLoss | None = None

    def __post_init__(self) -> None:
        for name in ('kd_weight', 'self_conditioning_rate', 'min_noise_level'):
            check_range(name, getattr(self, name), 0, 1)
        self.position_loss()

    def position_loss(self) -> TokenLoss:
        """Returns the loss of a position."""
        custom_loss = read_value('stage1.token_loss', self.token_loss, '__call__', noun='loss')
        return denoise_loss if custom_loss is None else custom_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage1(Stage1Config):
    """The objective of stage 1, see the docstring of this module.

    Attributes:
      corruption: the forward process.
      schedule: the sampler's temperatures, which shape the self-conditioning input.
    """

    corruption: Corruption
    schedule: TemperatureSchedule

    @property
    def num_steps(self) -> int:
        """Returns the number of denoise steps that are trained."""
        return 1

    def draw(self, key: jax.Array, batch: Batch) -> Draw:
        """Returns the random choices of a step, see `step.Objective`."""
        noise_key, condition_key = jax.random.split(key)
        noisy = canvases.draw_noise(
            noise_key, batch['canvas_tokens'], self.corruption, min_noise_level=self.min_noise_level
        )
        rows = (batch['canvas_tokens'].shape[0], 1, 1, 1)
        conditioned = jax.random.bernoulli(condition_key, self.self_conditioning_rate, rows)
        used = canvases.used_positions(batch)
        return Draw(noisy, conditioned, mean_weights(used), mean_weights(used & noisy.corrupted))

    def loss(
        self,
        model: DiffusionGemma,
        params: Params,
        draw: Draw,
        batch: Batch,
        prefix: Prefix,
        teacher: TeacherStates,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns loss and metrics, see `step.Objective`."""
        noisy, clean = draw.noisy, batch['canvas_tokens']
        soft = None
        if self.self_conditioning_rate > 0 and model.config.self_conditioning:
            soft = self._first_prediction(model, params, batch, prefix, noisy)
            soft = jnp.where(draw.conditioned, soft, 0.0)  # [B, N, C, D]
        hidden = canvases.denoise(model, params, batch, prefix, noisy.tokens, soft)
        targets, has_target = canvases.canvas_teacher(teacher.values, batch)
        weight = canvases.kl_weights(noisy, has_target, self.kd_weight)
        token_loss = self.position_loss()

        def score(
            params: Params,
            teacher_params: Params,
            hidden: jax.Array,
            clean: jax.Array,
            targets: Any,
            weight: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({'params': params}, hidden, method='unembed')  # [B, c, V]
            loss = token_loss(logits, clean, teacher.read(targets, teacher_params), weight)
            if jnp.shape(loss) != clean.shape:
                raise ValueError(
                    f'{token_loss!r} returned an array of shape {list(jnp.shape(loss))}; it must '
                    f'return the loss of each position, {list(clean.shape)}.'
                )
            return loss, canvases.hits(logits, clean)

        read, scored = (params, teacher.params), (hidden, clean, targets, weight)
        loss, hits = score_positions(score, model, read, clean.shape, *scored)
        return jnp.sum(loss * draw.used), {'canvas_accuracy': jnp.sum(hits * draw.corrupted)}

    def _first_prediction(
        self,
        model: DiffusionGemma,
        params: Params,
        batch: Batch,
        prefix: Prefix,
        noisy: NoisyCanvases,
    ) -> jax.Array:
        """Returns the soft embeddings [B, N, C, D] of a pass without gradient.

        Its logits are divided by the sampler's temperature at the same noise level, as for
        self-conditioning in the sampler.
        """
        params, prefix = jax.lax.stop_gradient((params, prefix))
        hidden = canvases.denoise(model, params, batch, prefix, noisy.tokens)
        temperature = jnp.asarray(self.schedule.temperature(noisy.noise_level))[..., None]
        temperature = jnp.broadcast_to(temperature, noisy.tokens.shape)  # [B, N, C]

        def soft_embed(params: Params, hidden: jax.Array, temperature: jax.Array) -> jax.Array:
            logits = model.apply({'params': params}, hidden, method='unembed')
            shaped = logits / temperature[..., None]
            soft: jax.Array = model.apply({'params': params}, shaped, method='soft_embed')
            return soft

        shape = noisy.tokens.shape
        soft: jax.Array = score_positions(soft_embed, model, [params], shape, hidden, temperature)
        return soft
