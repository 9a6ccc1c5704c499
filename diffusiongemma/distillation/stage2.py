"""Stage 2 of Diffuse-Distill: trains few-step denoising on the student's own trajectory.

From a noisy canvas the student takes `num_steps` steps like the sampler: denoise, accept the most
certain positions, renoise the others, and condition on the shaped prediction. The prediction of
every step is trained on the clean canvas, so that the student learns to denoise the canvases that
occur in sampling, and to be right in early steps:

    L = mean over steps n of CE(x | q_S(. | x_n, s_n, c)), with the mix of stage 1 at n = 0
        + certainty_weight * mean of the entropy of q_S, taken as 0 where its argmax is wrong

No gradient flows between steps: each one is trained independently, given its inputs. The certainty
term sharpens correct predictions, because the entropy bound accepts by certainty (compare
certainty-forcing distillation in dParallel, arXiv:2509.26488).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusiongemma.diffusion.corruption import Corruption, MaskedCorruption, UniformCorruption
from diffusiongemma.distillation import canvases
from diffusiongemma.distillation.canvases import Batch, NoisyCanvases
from diffusiongemma.distillation.head import score_positions
from diffusiongemma.distillation.losses import cross_entropy, denoise_loss, mean_weights
from diffusiongemma.distillation.teacher import TeacherStates
from diffusiongemma.errors import check_range
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.vocabulary import largest_logits
from diffusiongemma.sampling import acceptance
from diffusiongemma.sampling.acceptance import AcceptanceRule, Proposal
from diffusiongemma.sampling.epilogue import entropy, read_logits
from diffusiongemma.sampling.schedule import TemperatureSchedule


class Draw(NamedTuple):
    """The random choices of a step, and weights that turn sums over positions into means.

    Attributes:
      noisy: the canvases at which trajectories start.
      renoise: for each step but the last, [B, N, C] int32, the noise of rejected positions.
      keys: for each step but the last, [B, N] keys for an acceptance rule that draws.
      used: [B, N, C] float32, weights of the used positions.
      from_noise: [B, N, C] float32, weights of the positions in trajectories from t = 1.
    """

    noisy: NoisyCanvases
    renoise: tuple[jax.Array, ...]
    keys: tuple[jax.Array, ...]
    used: jax.Array
    from_noise: jax.Array


class StepStatistics(NamedTuple):
    """The statistics that a sampler computes from a prediction, without gradient.

    Attributes:
      entropies: [...] float32, entropy of the shaped distribution in nats.
      candidates: [...] int32, its argmax tokens.
      confidences: [...] float32, the probabilities of the candidates.
      margins: [...] float32, confidences minus the probabilities of the second most likely tokens.
      soft_embeddings: [..., D], the self-conditioning input of the next step.
      logits: [..., V] float32, shaped logits; None unless the acceptance rule reads them.
    """

    entropies: jax.Array
    candidates: jax.Array
    confidences: jax.Array
    margins: jax.Array
    soft_embeddings: jax.Array
    logits: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Stage2Config:
    """The settings of stage 2 (`config.stage2`).

    Attributes:
      first_step: the step at which stage 1 ends and stage 2 begins; None for only stage 1.
      num_steps: m, the number of denoise steps of a trajectory.
      kd_weight: the weight of the teacher's KL at t = 1 in the first step.
      certainty_weight: the weight of the entropy at positions with a correct argmax. The mean is
        taken over all positions, so that the few that are correct at first do not dominate and
        the losses of the parts of a batch add up.
      all_noise_rate: the share of trajectories that start at t = 1, like the sampler; all others
        start at t ~ U(min_noise_level, 1).
      min_noise_level: the lowest noise level t.
    """

    first_step: int | None = None
    num_steps: int = 2
    kd_weight: float = 1.0
    certainty_weight: float = 0.0
    all_noise_rate: float = 0.5
    min_noise_level: float = 1e-3

    def __post_init__(self) -> None:
        check_range('num_steps', self.num_steps, 1)
        check_range('certainty_weight', self.certainty_weight, 0)
        for name in ('kd_weight', 'all_noise_rate', 'min_noise_level'):
            check_range(name, getattr(self, name), 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage2(Stage2Config):
    """The objective of stage 2, see the docstring of this module.

    Attributes:
      corruption: the forward process, which also makes the noise of rejected positions.
      schedule: the sampler's temperatures.
      acceptance: the sampler's acceptance rule.
    """

    corruption: Corruption
    schedule: TemperatureSchedule
    acceptance: AcceptanceRule

    def draw(self, key: jax.Array, batch: Batch) -> Draw:
        """Returns the random choices of a step, see `step.Objective`."""
        noise_key, renoise_key = jax.random.split(key)
        clean, used = batch['canvas_tokens'], canvases.used_positions(batch)
        noisy = canvases.draw_noise(
            noise_key,
            clean,
            self.corruption,
            min_noise_level=self.min_noise_level,
            all_noise_rate=self.all_noise_rate,
        )
        renoise = (
            self.corruption.corrupt(jax.random.fold_in(renoise_key, n), clean, jnp.ones(()))[0]
            for n in range(self.num_steps - 1)
        )
        keys = (
            jax.random.split(jax.random.fold_in(renoise_key, self.num_steps + n), clean.shape[:2])
            for n in range(self.num_steps - 1)
        )
        from_noise = used & (noisy.noise_level == 1)[..., None]
        return Draw(
            noisy, tuple(renoise), tuple(keys), mean_weights(used), mean_weights(from_noise)
        )

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
        clean = batch['canvas_tokens']
        targets, has_target = canvases.canvas_teacher(teacher.values, batch)
        weight = canvases.kl_weights(draw.noisy, has_target, self.kd_weight)
        canvas, soft, metrics = draw.noisy.tokens, None, {}
        total = jnp.zeros(())
        rule_state = acceptance.first_state(self.acceptance, _rows(canvas))
        for n in range(self.num_steps):
            hidden = canvases.denoise(model, params, batch, prefix, canvas, soft)  # [B, N, C, D]
            level = jnp.minimum(draw.noisy.noise_level, self.schedule.noise_level(n))
            levels = jnp.broadcast_to(level[..., None], clean.shape)  # [B, N, C]
            is_last = n + 1 == self.num_steps

            read, mix = (params, {} if n else teacher.params), () if n else (targets, weight)
            score = functools.partial(self._score, model, teacher, is_last)
            loss, hits, statistics = score_positions(
                score, model, read, clean.shape, hidden, clean, levels, *mix
            )
            loss = jnp.sum(loss * draw.used)
            total += loss / self.num_steps
            metrics[f'loss/step_{n + 1}'] = loss
            metrics[f'canvas_accuracy/step_{n + 1}'] = jnp.sum(hits * draw.from_noise)
            if not is_last:
                if acceptance.reads_logits(self.acceptance):
                    logits = model.apply({'params': params}, hidden, method='unembed')
                    statistics = statistics._replace(logits=self.shape(logits, levels))
                canvas, rule_state = self.next_canvas(
                    statistics, canvas, draw.renoise[n], draw.keys[n], level, rule_state
                )
                soft = statistics.soft_embeddings
        return total, metrics

    def _score(
        self,
        model: DiffusionGemma,
        teacher: TeacherStates,
        is_last: bool,
        params: Params,
        teacher_params: Params,
        hidden: jax.Array,
        clean: jax.Array,
        levels: jax.Array,
        *mix: Any,
    ) -> tuple[jax.Array, jax.Array, StepStatistics | None]:
        """Returns the loss and the hits of some positions, and the statistics of the next step.

        Args:
          model: the student.
          teacher: the teacher's distributions; used at the first step only.
          is_last: whether the step is the last one, which needs no statistics.
          params: the parameters of the student.
          teacher_params: the parameters with which `teacher` reads.
          hidden: [B, c, D], hidden states of the denoise pass.
          clean: [B, c] int32, clean tokens.
          levels: [B, c] float32, noise levels.
          *mix: at the first step the values of `teacher` and the weights of its KL.
        """
        logits = model.apply({'params': params}, hidden, method='unembed')  # [B, c, V]
        hits = canvases.hits(logits, clean)
        if mix:
            targets, weight = mix
            loss = denoise_loss(logits, clean, teacher.read(targets, teacher_params), weight)
        else:
            loss = cross_entropy(logits, clean)
        if self.certainty_weight:
            loss += self.certainty_weight * hits * entropy(logits)
        statistics = None if is_last else self.step_statistics(model, params, logits, levels)
        return loss, hits, statistics

    def shape(self, logits: jax.Array, level: jax.Array) -> jax.Array:
        """Returns shaped logits [..., V] for noise levels [...], without gradient."""
        temperature = jnp.asarray(self.schedule.temperature(level))[..., None]  # [..., 1]
        shaped = jax.lax.stop_gradient(logits) / temperature
        if isinstance(self.corruption, MaskedCorruption):
            shaped = shaped.at[..., self.corruption.mask_id].set(-jnp.inf)
        return shaped

    def step_statistics(
        self, model: DiffusionGemma, params: Params, logits: jax.Array, level: jax.Array
    ) -> StepStatistics:
        """Returns the statistics of a greedy sampler step for logits [..., V], levels [...]."""
        params, shaped = jax.lax.stop_gradient(params), self.shape(logits, level)
        ((largest, candidates),) = largest_logits(shaped)
        prediction = read_logits(shaped, candidates, candidates, largest)
        return StepStatistics(
            prediction.entropies,
            candidates,
            prediction.confidences,
            prediction.margins,
            model.apply({'params': params}, shaped, prediction.log_z, method='soft_embed'),
        )

    def next_canvas(
        self,
        statistics: StepStatistics,
        canvas: jax.Array,
        noise: jax.Array,
        keys: jax.Array,
        noise_level: jax.Array,
        rule_state: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the canvas that the acceptance rule makes after a step, and the rule's state.

        Args:
          statistics: the statistics of the step.
          canvas: [B, N, C] int32, the input of the step.
          noise: [B, N, C] int32, the noise of rejected positions.
          keys: [B, N] keys.
          noise_level: [B, N] float32, the noise level of `canvas`.
          rule_state: the state of the rule for B * N rows, from the previous step.

        Returns:
          The next canvas [B, N, C] int32, and the new state of the rule.
        """
        corruption, is_open = self.corruption, jnp.ones(canvas.shape, bool)
        if isinstance(corruption, MaskedCorruption):
            is_open = canvas == corruption.mask_id
        level = noise_level[..., None]  # [B, N, 1]
        proposal = Proposal(
            canvas=_rows(canvas),  # [B * N, C]
            candidates=_rows(statistics.candidates),
            noise=_rows(noise),
            open=_rows(is_open),
            entropies=_rows(jnp.where(is_open, statistics.entropies, 0.0)),
            confidences=_rows(jnp.where(is_open, statistics.confidences, 1.0)),
            margins=_rows(jnp.where(is_open, statistics.margins, 1.0)),
            noise_level=_rows(level),
            next_noise_level=_rows(jnp.maximum(level - 1 / self.schedule.num_steps, 0.0)),
            keys=keys.reshape(-1),  # [B * N]
            vocab_size=corruption.vocab_size if isinstance(corruption, UniformCorruption) else None,
            logits=None if statistics.logits is None else _rows(statistics.logits),
            temperature=_rows(jnp.asarray(self.schedule.temperature(level))),
            greedy=True,
        )
        tokens, rule_state = acceptance.next_canvas(self.acceptance, proposal, rule_state)
        return tokens.reshape(canvas.shape), rule_state


def _rows(leaf: jax.Array) -> jax.Array:
    """Reshapes [B, N, ...] -> [B * N, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:])
