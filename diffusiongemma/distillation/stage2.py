"""Stage 2 of Diffuse-Distill: few steps, learnt on the student's own trajectory.

From a noisy canvas the student takes `num_steps` steps as the sampler takes them: denoise, accept
the most certain positions, make noise of the others, feed the shaped prediction back. Every
step's prediction is trained on the clean canvas, so that the student learns to finish from the
canvases that it really meets, and to be right as early as it can:

    L = mean over steps n of CE(x | q_S(. | x_n, s_n, c)), with the mix of stage 1 at n = 0
        + certainty_weight * mean entropy of q_S where its argmax is right

Between two steps there is no gradient: each is trained for itself, given what it gets. The
certainty term sharpens what is right already, because the entropy bound accepts by certainty
(compare certainty-forcing distillation in dParallel, arXiv:2509.26488).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.diffusion.corruption import Corruption
from diffusiongemma.distillation import canvases
from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.losses import cross_entropy, masked_mean
from diffusiongemma.distillation.teacher import TeacherDistribution
from diffusiongemma.models.cache import Prefix
from diffusiongemma.sampling.acceptance import AcceptanceRule
from diffusiongemma.sampling.epilogue import entropy
from diffusiongemma.sampling.schedule import TemperatureSchedule


@dataclasses.dataclass(frozen=True)
class Stage2:
    """The objective of the module's docstring.

    Attributes:
      corruption: the forward process; also what rejected positions become.
      schedule: the sampler's temperatures.
      acceptance: the sampler's rule.
      num_steps: m, denoise steps of a trajectory.
      kd_weight: share of the teacher's KL at t = 1 in the first step.
      certainty_weight: weight of the entropy where the argmax is right.
      all_noise_rate: share of the trajectories that start at t = 1, as the sampler does; the
        others start at t ~ U(min_noise_level, 1).
      min_noise_level: lowest t.
      self_conditioning: later steps see what the step before believed, as in the sampler.
    """

    corruption: Corruption
    schedule: TemperatureSchedule
    acceptance: AcceptanceRule
    num_steps: int = 2
    kd_weight: float = 1.0
    certainty_weight: float = 0.0
    all_noise_rate: float = 0.5
    min_noise_level: float = 1e-3
    self_conditioning: bool = True

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f'stage2.num_steps must be >= 1, got {self.num_steps}.')
        if self.certainty_weight < 0:
            raise ValueError(f'certainty_weight must be >= 0, got {self.certainty_weight}.')
        for name in ('kd_weight', 'all_noise_rate', 'min_noise_level'):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f'{name} must lie in [0, 1], got {value}.')

    def loss(
        self,
        model: nn.Module,
        params: dict,
        key: jax.Array,
        batch: Batch,
        prefix: Prefix,
        teacher: TeacherDistribution,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `step.Objective`."""
        noise_key, renoise_key = jax.random.split(key)
        clean, used = batch['canvas_tokens'], canvases.used_positions(batch)
        noisy = canvases.draw_noise(
            noise_key,
            clean,
            self.corruption,
            min_noise_level=self.min_noise_level,
            all_noise_rate=self.all_noise_rate,
        )
        from_noise = used & (noisy.noise_level == 1)[..., None]
        canvas, soft, total, metrics = noisy.tokens, None, 0.0, {}
        for n in range(self.num_steps):
            logits = canvases.denoise(model, params, batch, prefix, canvas, soft)
            if n == 0:
                loss = canvases.mixed_loss(logits, batch, teacher, noisy, self.kd_weight)
            else:
                loss = masked_mean(cross_entropy(logits, clean), used)
            if self.certainty_weight:
                right = used & (jnp.argmax(logits, axis=-1) == clean)
                loss += self.certainty_weight * masked_mean(entropy(logits), right)
            total += loss / self.num_steps
            metrics[f'loss/step_{n + 1}'] = loss
            metrics[f'canvas_accuracy/step_{n + 1}'] = canvases.argmax_accuracy(
                logits, batch, from_noise
            )
            if n + 1 < self.num_steps:
                step_key = jax.random.fold_in(renoise_key, n)
                level = jnp.minimum(noisy.noise_level, self.schedule.noise_level(n))
                canvas, soft = self.advance(model, params, step_key, logits, level)
        return total, metrics

    def advance(
        self, model: nn.Module, params: dict, key: jax.Array, logits: jax.Array, level: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """The sampler's greedy step: next canvas [B, N, C] and soft embeddings, no gradient.

        Args:
          model: a DiffusionGemma.
          params: its parameters.
          key: of the renoising.
          logits: [B, N, C, V] of this step.
          level: [B, N] noise level that sets the temperature.
        """
        params, logits = jax.lax.stop_gradient((params, logits))
        shaped = logits / self.schedule.temperature(level)[..., None, None]
        accepted = self.acceptance.accept(entropy(shaped))
        candidates = jnp.argmax(shaped, axis=-1).astype(jnp.int32)
        noise, _ = self.corruption.corrupt(key, candidates, jnp.ones(()))
        canvas = jnp.where(accepted, candidates, noise)
        if not self.self_conditioning:
            return canvas, None
        return canvas, model.apply({'params': params}, shaped, method='soft_embed')
