"""The drafting objective: trains a denoiser for the accepted length of its drafts.

One pass of the frozen teacher over a row serves many canvases, which start at random positions of
the responses (anchors) and may overlap. Each canvas has the inputs of the lossless sampler at its
first step: the pending token (known but not yet encoded), noise after it, and the teacher's states
of the prefix. With q_j the draft's probability of the text's token at position j, the loss is

    L = - sum_j w_j log q_j / sum_j w_j        for each canvas, then the mean over canvases

with the weights of `position_weights.py`. For sampled text, a share of the loss is the total
variation distance to the teacher's distribution, which is the probability that a sampled draft
token is rejected (`sampling.lossless`; DSpark trains with weights 0.1 and 0.9).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusiongemma.diffusion.corruption import Corruption
from diffusiongemma.distillation.anchors import anchor_places, draw_anchors
from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.losses import mean_weights, over_positions
from diffusiongemma.distillation.position_weights import PositionWeights, read_weights
from diffusiongemma.distillation.teacher import FullDistribution, TeacherStates
from diffusiongemma.errors import check_range
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.sampling.drafts import MAX_NGRAM


class Draw(NamedTuple):
    """The random choices of a step, and weights that turn sums over canvases into means.

    Attributes:
      anchors: [B, A] int32, the index in the row of each canvas's pending token.
      noise: [B, A, C] int32, the noise after it.
      replaced: [B, A] bool, canvases that start where the draft at this anchor was rejected.
      canvases: [B, A] float32, weights of the used canvases.
    """

    anchors: jax.Array
    noise: jax.Array
    replaced: jax.Array
    canvases: jax.Array


class Draft(NamedTuple):
    """Scores of the drafts of a batch, [B, A, K] each, at the K positions after each anchor.

    Attributes:
      cross_entropy: float32, -log q of the text's token; 0 outside of the draft vocabulary.
      probabilities: float32, q of the text's token; 0 outside of the draft vocabulary.
      hits: bool, whether the greedy draft token equals the text's, given earlier text tokens.
      variation: float32, total variation distance to the teacher's distribution, or None.
      valid: bool, whether the position has a target; the other scores are undefined elsewhere.
    """

    cross_entropy: jax.Array
    probabilities: jax.Array
    hits: jax.Array
    variation: jax.Array | None
    valid: jax.Array

    @property
    def accepted(self) -> jax.Array:
        """Returns which greedy draft tokens are accepted, [B, A, K] bool."""
        return jnp.cumprod((self.hits & self.valid).astype(jnp.int32), axis=-1) > 0


@dataclasses.dataclass(frozen=True)
class DraftingConfig:
    """Settings of the drafting objective (`config.drafting`).

    Attributes:
      weights: the position weights: 'accepted_length', 'decay', 'equal', or any other
        `PositionWeights` or its text, such as 'my_losses.Mine(gamma=2)'.
      smoothing: the smoothing of the accepted-length weights.
      gamma: the decay constant of 'decay', in positions.
      anchors_per_row: A, the maximum number of canvases per row.
      total_variation: the weight of the total variation distance in the loss; the remaining weight
        is that of the cross-entropy. 0 for greedy text.
      refused_rate: the share of canvases that start where the draft at their anchor was rejected:
        at the teacher's token that replaces the first rejected one. The sampler drafts from such
        states, which are harder than random ones. Needs an additional pass without gradient.
      lookup_ngram: excludes canvases at whose start the last `lookup_ngram` tokens also occur
        earlier in the document, because there the sampler's setting of the same name drafts
        without the model. 0 excludes none.
      prompts: whether canvases also start in prompts. There the targets are the teacher's argmax
        tokens (within the draft vocabulary) given the prompt so far, and a canvas ends at the
        first difference between prompt and targets.
      held_out: the number of examples at the end of the targets that are held out from training,
        to report accepted lengths on them; at most a tenth of the targets are.
    """

    weights: str | PositionWeights = 'accepted_length'
    smoothing: float = 0.5
    gamma: float = 4.0
    anchors_per_row: int = 32
    total_variation: float = 0.0
    refused_rate: float = 0.0
    lookup_ngram: int = 0
    prompts: bool = False
    held_out: int = 64

    def __post_init__(self) -> None:
        check_range('held_out', self.held_out, 1)
        check_range('anchors_per_row', self.anchors_per_row, 1)
        check_range('lookup_ngram', self.lookup_ngram, 0, MAX_NGRAM)
        check_range('total_variation', self.total_variation, 0, 1)
        check_range('refused_rate', self.refused_rate, 0, 1)
        self.position_weights()

    def position_weights(self) -> PositionWeights:
        """Returns the position weights of these settings."""
        return read_weights(self.weights, self.smoothing, self.gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting(DraftingConfig):
    """The drafting objective, see the docstring of this module.

    Attributes:
      corruption: the forward process that makes the noise of a canvas.
      canvas_length: C, the number of tokens of a canvas.
    """

    corruption: Corruption
    canvas_length: int

    @property
    def num_steps(self) -> int:
        """Returns the number of denoise steps that are trained."""
        return 1

    def draw(self, key: jax.Array, batch: Batch) -> Draw:
        """Returns the random choices of a step, see `step.Objective`."""
        anchor_key, noise_key, refused_key = jax.random.split(key, 3)
        places = anchor_places(batch, self.lookup_ngram, self.prompts)
        anchors, used = draw_anchors(anchor_key, places, self.anchors_per_row)  # [B, A]
        shape = (*anchors.shape, self.canvas_length)
        clean = jnp.zeros(shape, jnp.int32)  # [B, A, C], any tokens: at t = 1 none is kept
        noise, _ = self.corruption.corrupt(noise_key, clean, jnp.ones(()))
        replaced = jax.random.bernoulli(refused_key, float(self.refused_rate), anchors.shape)
        return Draw(anchors, noise, replaced, mean_weights(used))

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
        anchors = draw.anchors
        if self.refused_rate > 0:
            refused = self._refused_at(model, params, draw, batch, prefix, teacher)
            anchors = jnp.where(draw.replaced, refused, anchors)
        draft = self.draft(model, params, anchors, draw.noise, batch, prefix, teacher)
        losses = draft.cross_entropy
        if draft.variation is not None:
            losses = (1 - self.total_variation) * losses + self.total_variation * draft.variation
        weights = self.position_weights().weights(draft.probabilities, draft.valid)  # [B, A, K]
        total = jnp.maximum(jnp.sum(weights, axis=-1), 1e-6)  # [B, A], 1e-6 for an empty draft
        per_canvas = jnp.sum(weights * losses, axis=-1) / total  # [B, A]
        return jnp.sum(per_canvas * draw.canvases), accepted_lengths(draft, draw.canvases)

    def draft(
        self,
        model: DiffusionGemma,
        params: Params,
        anchors: jax.Array,
        noise: jax.Array,
        batch: Batch,
        prefix: Prefix,
        teacher: TeacherStates,
    ) -> Draft:
        """Scores drafts from the pending tokens at `anchors` [B, A], with `noise` [B, A, C]."""
        tokens, length = batch['tokens'], batch['tokens'].shape[1]
        hidden = _draft_hidden(model, params, anchors, noise, batch, prefix, teacher.hidden)
        places = anchors[..., None] + 1 + jnp.arange(hidden.shape[2])  # [B, A, K]
        rows = jnp.arange(len(tokens))[:, None, None]  # [B, 1, 1]
        inside = jnp.minimum(places, length - 1)
        same = batch['segment_ids'][rows, inside] == _at(batch['segment_ids'], anchors)[..., None]
        valid = (places < length) & same
        text, before = tokens[rows, inside], tokens[rows, inside - 1]  # [B, A, K]
        if self.prompts:
            greedy = self._greedy_tokens(model, params, teacher.hidden[rows, inside - 1])
            target = jnp.where(batch['target_mask'][rows, inside], text, greedy)
            agrees = jnp.pad(target == text, [(0, 0), (0, 0), (1, 0)], constant_values=True)
            # A position is valid if text and target agree at all positions before it.
            valid &= jnp.cumprod(agrees[..., :-1].astype(jnp.int32), axis=-1) > 0
            text = target
        values: tuple[Any, ...] = ()
        if self.total_variation > 0:
            values = (jax.tree.map(lambda leaf: leaf[rows, inside - 1], teacher.values),)

        def score(
            hidden: jax.Array, text: jax.Array, before: jax.Array, *values: Any
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
            variables = {'params': params}
            logits = model.apply(variables, hidden, method='draft_logits')  # [B, c, Vd]
            if model.light is not None and model.light.serial_rank:
                logits += model.apply(variables, before, method='serial_logits')
            row, known = model.apply(variables, text, method='draft_rows')
            known_row = jnp.where(known, row, 0)
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            log_q = jnp.take_along_axis(log_probs, known_row[..., None], axis=-1)[..., 0]  # [B, c]
            log_q = jnp.where(known, log_q, 0.0)
            hits = known & (jnp.argmax(logits, axis=-1) == row)
            variation = None
            if values:
                variation = _total_variation(model, params, log_probs, teacher.read(values[0]))
            return -log_q, jnp.where(known, jnp.exp(log_q), 0.0), hits, variation

        chunk = model.execution.logits_chunk
        scores = over_positions(score, chunk, places.shape, hidden, text, before, *values)
        cross_entropy, probabilities, hits, variation = scores
        return Draft(cross_entropy, probabilities, hits, variation, valid)

    def _greedy_tokens(self, model: DiffusionGemma, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns the teacher's argmax draft tokens [B, A, K] for hidden states [B, A, K, D]."""

        def choose(hidden: jax.Array) -> jax.Array:
            logits = model.apply({'params': params}, hidden, method='draft_logits')  # [B, c, Vd]
            row = jnp.argmax(logits, axis=-1)
            tokens: jax.Array = model.apply({'params': params}, row, method='draft_tokens')
            return tokens.astype(jnp.int32)

        hidden = jax.lax.stop_gradient(hidden)
        chunk, shape = model.execution.logits_chunk, hidden.shape[:-1]
        tokens: jax.Array = over_positions(choose, chunk, shape, hidden)
        return tokens

    def _refused_at(
        self,
        model: DiffusionGemma,
        params: Params,
        draw: Draw,
        batch: Batch,
        prefix: Prefix,
        teacher: TeacherStates,
    ) -> jax.Array:
        """Returns the index [B, A] of the token that replaces the first rejected draft token.

        It is the anchor if no draft can start there.
        """
        params = jax.lax.stop_gradient(params)
        greedy = dataclasses.replace(self, total_variation=0.0)
        draft = greedy.draft(model, params, draw.anchors, draw.noise, batch, prefix, teacher)
        refused = draw.anchors + 1 + jnp.sum(draft.accepted, axis=-1)  # [B, A]
        refused = jnp.minimum(refused, batch['tokens'].shape[1] - 1)
        same = _at(batch['segment_ids'], refused) == _at(batch['segment_ids'], draw.anchors)
        places = anchor_places(batch, self.lookup_ngram, self.prompts)
        return jnp.where(same & _at(places, refused), refused, draw.anchors)


def accepted_lengths(draft: Draft, canvases: jax.Array) -> dict[str, jax.Array]:
    """Returns mean accepted lengths: tokens per verification, including the bonus token.

    Args:
      draft: the scores of the drafts of a batch.
      canvases: [B, A] float32, weights that sum to 1.
    """
    reached = jnp.cumprod(jnp.where(draft.valid, draft.probabilities, 0.0), axis=-1)  # [B, A, K]
    expected = 1 + jnp.sum(reached, axis=-1)  # [B, A]
    length = 1 + jnp.sum(draft.accepted, axis=-1)
    return {
        'expected_accepted_length': jnp.sum(expected * canvases),
        'accepted_length': jnp.sum(length * canvases),
    }


def acceptance_by_position(draft: Draft, canvases: jax.Array) -> jax.Array:
    """Returns the acceptance rate at each draft position, given that all earlier were accepted.

    The rates are [K] float32; a rate is 0 if no draft got that far. Padding does not count.
    """
    used = (canvases > 0)[..., None]  # [B, A, 1]
    before = jnp.pad(draft.accepted[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=True)
    tried = jnp.sum(used & before & draft.valid, axis=(0, 1))  # [K]
    return jnp.sum(used & draft.accepted, axis=(0, 1)) / jnp.maximum(tried, 1)


def _draft_hidden(
    model: DiffusionGemma,
    params: Params,
    anchors: jax.Array,
    noise: jax.Array,
    batch: Batch,
    prefix: Prefix,
    hidden: jax.Array,
) -> jax.Array:
    """Returns the hidden states [B, A, K, D] that predict the K tokens after each anchor [B, A].

    The canvas is built as in the sampler, see `sampling.drafts`.
    """
    pending, segment_ids = _at(batch['tokens'], anchors), _at(batch['segment_ids'], anchors)
    starts, light, more = _at(batch['positions'], anchors), model.light, {}
    if light is not None and light.teacher_state:
        more['teacher_state'] = _at(hidden, jnp.maximum(anchors - 1, 0))  # [B, A, D]
    if model.config.predict_next:
        canvas, starts, more['previous'] = noise, starts + 1, pending
    else:
        canvas = jnp.concatenate([pending[..., None], noise[..., 1:]], axis=-1)  # [B, A, C]
    args = (canvas, starts, segment_ids, prefix)
    output: jax.Array = model.apply({'params': params}, *args, **more, method='denoise_hidden')
    return output if model.config.predict_next else output[:, :, 1:]  # K is C or C - 1


def _at(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the values of rows [B, L, ...] at indices [B, A]: [B, A, ...]."""
    return rows[jnp.arange(len(rows))[:, None], index]


def _total_variation(
    model: DiffusionGemma, params: Params, log_probs: jax.Array, distribution: Any
) -> jax.Array:
    """Returns 1 - sum_x min(p_T(x), q(x)) for log q [..., Vd] -> [...] float32."""
    if not isinstance(distribution, FullDistribution):
        raise ValueError(
            'drafting.total_variation needs the whole distribution of the teacher: set '
            'config.targets.top_k_logits to 0.'
        )
    logits, size = distribution.logits.astype(jnp.float32), log_probs.shape[-1]
    probs = jax.nn.softmax(logits, axis=-1)
    if size < probs.shape[-1]:
        tokens = model.apply({'params': params}, jnp.arange(size), method='draft_tokens')
        probs = jnp.take(probs, tokens, axis=-1)  # [..., Vd]; q of other tokens is 0
    return 1 - jnp.sum(jnp.minimum(probs, jnp.exp(log_probs)), axis=-1)
