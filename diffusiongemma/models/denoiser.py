"""DiffusionGemma: the denoiser, one backbone with an encode and a denoise pass."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.backbone import ACTIVATION_AXES, Backbone, PassContext
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.config import LIGHT, SEPARATE, LightConfig, ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.layers import GatedMLP, RMSNorm, rms_normalize, weight
from diffusiongemma.models.light import LightBackbone, SerialCorrection, TeacherState
from diffusiongemma.models.masks import AttentionMask, CausalMask, canvas_mask
from diffusiongemma.models.precision import native_dtype
from diffusiongemma.models.transformer import Gemma, rope_by_kind

# Parameters of a denoiser with layers of its own; those of them that a model has are trained.
DENOISER_ALONE = ('denoise_backbone', 'self_conditioning', 'teacher_state', 'serial')
DRAFT_IDS = 'draft_ids'  # tokens of the draft vocabulary, int32 [Vd] in increasing order
DRAFT_HEAD = 'draft_head'  # their rows of the embedding, where `Execution.gather_draft_head`


class SelfConditioning(nn.Module):
    """Adds what the previous denoise step believed to the canvas embeddings.

    h = rmsnorm(embed(canvas) + mlp(rmsnorm(soft embeddings))), the outer norm without
    scale. The MLP's output starts at zero, so that a fresh student ignores it.
    """

    config: ModelConfig
    dtype: jnp.dtype
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, '*B D'], soft_embeddings: Float[Array, '*B D'] | None
    ) -> Float[Array, '*B D']:
        """[..., D], and [..., D] or None at the first step -> [..., D]."""
        config = self.config
        if soft_embeddings is None:
            soft_embeddings = jnp.zeros_like(embeddings)
        norm = RMSNorm(config.norm_eps, config.norm_scale_offset, name='pre_norm')
        mlp = GatedMLP(
            config.width,
            config.ffn_width,
            self.dtype,
            self.execution.output_major,
            zero_init_output=True,
            name='mlp',
        )
        combined = embeddings + mlp(norm(soft_embeddings.astype(self.dtype)))
        return rms_normalize(combined, config.norm_eps).astype(self.dtype)


class DiffusionGemma(Gemma):
    """The denoiser. `encode` is the causal pass of its parent.

    Both passes run on the same weights but for the layer scalars (as released), or the denoise
    pass has layers of its own: see `DenoiserConfig.kind`.
    """

    def setup(self) -> None:
        if not self.config.is_diffusion:
            raise ValueError(
                'DiffusionGemma needs a config with a denoiser (canvas_length > 0); '
                'for a purely autoregressive model use Gemma.'
            )
        super().setup()
        config, dtype, light = self.config, self.denoise_dtype, self.light
        if light is None or config.self_conditioning:
            self.self_conditioning = SelfConditioning(config, dtype, self.execution)
        own: Any  # its inputs and outputs depend on the kind
        if config.kind == SEPARATE:
            own = Backbone(config.autoregressive, dtype, self.execution)
            self.denoise_backbone = own
        elif config.kind == LIGHT:
            self.denoise_backbone = LightBackbone(config, dtype, self.execution)
        if light is None:
            return
        if light.teacher_state:
            self.teacher_state = TeacherState(config, dtype)
        if light.serial_rank:
            self.serial = SerialCorrection(config)
        if light.draft_vocab_size:
            size = light.draft_vocab_size
            self.draft_ids = self.param(DRAFT_IDS, lambda _: jnp.arange(size, dtype=jnp.int32))
            if self.execution.gather_draft_head:
                shape = (size, config.width)
                self.draft_head = weight(self, DRAFT_HEAD, nn.initializers.zeros, shape)

    @property
    def light(self) -> LightConfig | None:
        """What a light denoiser has; None for the other kinds."""
        return self.config.light

    @property
    def denoise_dtype(self) -> jnp.dtype:
        """Compute dtype of the denoise pass on the devices at hand."""
        if self.config.has_frozen_encoder and self.execution.denoise_dtype is not None:
            return native_dtype(self.execution.denoise_dtype, self.execution.platform)
        return jnp.dtype(self.dtype)

    def denoise_hidden(
        self,
        canvas: Int[Array, 'B M C'],
        starts: Int[Array, 'B M'],
        segment_ids: Int[Array, 'B M'],
        prefix: Prefix,
        soft_embeddings: Float[Array, 'B M C D'] | None = None,
        previous: Int[Array, 'B M'] | None = None,
        teacher_state: Float[Array, 'B M D'] | None = None,
    ) -> Float[Array, 'B M C D']:
        """The denoise pass over M canvases per row (sampling: M = 1), short of the logits.

        Args:
          canvas: [B, M, C] int32 noisy tokens.
          starts: [B, M] int32, position of each canvas's first token.
          segment_ids: [B, M] int32, document of each canvas; 0 for an unused slot.
          prefix: the clean tokens, as cache or as the K/V of a packed training row.
          soft_embeddings: [B, M, C, D] from `soft_embed`, or None at the first step; of no effect
            without `config.self_conditioning`.
          previous: [B, M] int32, the token before each canvas; needed with
            `config.predict_next`, and only there.
          teacher_state: [B, M, D], the encode pass's final hidden state of the last token that
            the prefix has before each canvas; for a light denoiser that reads it.

        Returns:
          Final hidden states [B, M, C, D].
        """
        if not self.config.self_conditioning:
            soft_embeddings = None
        if self.config.predict_next:
            if previous is None:
                raise ValueError('a model with predict_next needs the token before each canvas.')
            canvas = _behind(previous[..., None], canvas, axis=-1)
            starts = starts - 1
            if soft_embeddings is not None:
                nothing = jnp.zeros_like(soft_embeddings[..., :1, :])
                soft_embeddings = _behind(nothing, soft_embeddings, axis=-2)
        length = canvas.shape[-1]
        masks: dict[str, AttentionMask | CausalMask] = {
            kind: canvas_mask(starts, segment_ids, length, keys, self.config.attention(kind).window)
            for kind, keys in prefix.tokens_by_kind(self.config).items()
        }
        positions = starts[..., None] + jnp.arange(length)  # [B, M, C]
        context = PassContext(rope_by_kind(self.config, positions), masks)
        embeddings = self.embedder.encode(canvas).astype(self.denoise_dtype)
        embeddings = self.execution.constrain(embeddings, *ACTIVATION_AXES)
        x = embeddings
        # One-shot drafts of a light denoiser enter its layers as tokens enter the teacher's.
        if self.light is None or self.config.self_conditioning:
            x = self.self_conditioning(embeddings, soft_embeddings)
        per_layer = self.per_layer_inputs(canvas, x)
        if self.light is not None:
            if self.light.teacher_state:
                if teacher_state is None:
                    raise ValueError("a light denoiser needs the teacher's state of each canvas.")
                x = self.teacher_state(x, teacher_state)
            return self.denoise_backbone(x, prefix.kv, context, per_layer)
        if self.config.kind == SEPARATE:
            hidden, _ = self.denoise_backbone(x, prefix.kv, context, 'encode', per_layer)
        else:
            hidden, _ = self.backbone(x, prefix.kv, context, 'denoise', per_layer)
        return hidden

    def denoise(
        self,
        canvas: Int[Array, 'B M C'],
        starts: Int[Array, 'B M'],
        segment_ids: Int[Array, 'B M'],
        prefix: Prefix,
        soft_embeddings: Float[Array, 'B M C D'] | None = None,
        previous: Int[Array, 'B M'] | None = None,
        teacher_state: Float[Array, 'B M D'] | None = None,
    ) -> Float[Array, 'B M C V']:
        """`denoise_hidden` and the head: float32 logits [B, M, C, V].

        Tokens outside of a draft vocabulary have logits of -inf. There is no serial correction:
        it needs the tokens before, see `serial_logits`.
        """
        args = (canvas, starts, segment_ids, prefix, soft_embeddings, previous, teacher_state)
        logits = self.draft_logits(self.denoise_hidden(*args))
        if self.light is None or not self.light.draft_vocab_size:
            return logits
        whole = jnp.full((*logits.shape[:-1], self.config.vocab_size), -jnp.inf, logits.dtype)
        return whole.at[..., self.draft_ids].set(logits)

    def draft_logits(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B Vd']:
        """[..., D] -> float32 soft-capped logits [..., Vd] of the draft vocabulary, else of V."""
        if self.light is None or not self.light.draft_vocab_size:
            return self.unembed(hidden)
        return self.embedder.decode(hidden, self.draft_table())

    def score_tokens(
        self, hidden: Float[Array, 'B K D'], tokens: Int[Array, 'B P']
    ) -> Float[Array, 'B K P']:
        """Logits of some tokens alone: [B, K, D], [B, P] int32 -> float32 [B, K, P]."""

        def of_row(hidden: Float[Array, 'K D'], tokens: Int[Array, ' P']) -> Float[Array, 'K P']:
            return self.embedder.decode(hidden, self.embedder.embedding[tokens])

        return jax.vmap(of_row)(hidden, tokens)

    def draft_table(self) -> Float[Array, 'Vd D']:
        """Rows of the embedding [Vd, D] of the draft vocabulary's tokens."""
        if self.execution.gather_draft_head:
            return self.draft_head
        return jnp.take(self.embedder.embedding, self.draft_ids, axis=0)

    def draft_rows(self, tokens: Int[Array, '*B']) -> tuple[Int[Array, '*B'], Bool[Array, '*B']]:
        """Places of tokens [...] in the draft vocabulary, and whether they have one, [...] bool.

        Outside of it the place is Vd. Without a draft vocabulary a token is its own place.
        """
        if self.light is None or not self.light.draft_vocab_size:
            return tokens, jnp.ones(tokens.shape, bool)
        size = self.light.draft_vocab_size
        place = jnp.searchsorted(self.draft_ids, tokens).astype(jnp.int32)
        found = jnp.take(self.draft_ids, jnp.minimum(place, size - 1)) == tokens
        return jnp.where(found, place, size), found

    def draft_tokens(self, rows: Int[Array, '*B']) -> Int[Array, '*B']:
        """Tokens at places [...] of the draft vocabulary: what `draft_rows` reverses."""
        if self.light is None or not self.light.draft_vocab_size:
            return rows
        return jnp.take(self.draft_ids, rows)

    def serial_logits(self, previous: Int[Array, '*B']) -> Float[Array, '*B Vd']:
        """What the logits of a draft gain by the tokens before, [...] int32 -> [..., Vd] float32.

        Only of a light denoiser with `serial_rank` > 0.
        """
        return self.serial(self.draft_rows(previous)[0])

    def soft_embed(self, logits: Float[Array, '*B V']) -> Float[Array, '*B D']:
        """Self-conditioning input: softmax(logits) @ embedding * sqrt(D), [..., V] -> [..., D]."""
        return self.embedder.soft_encode(logits, self.denoise_dtype)

    def __call__(self, tokens: Int[Array, 'B C']) -> Float[Array, 'B C V']:
        """Denoise logits [B, C, V] of tokens [B, C] as a canvas after themselves; for `init`."""
        batch_size, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        ones = jnp.ones_like(tokens)
        hidden, kv = self.encode(tokens, positions, ones)
        starts = jnp.full((batch_size, 1), length, jnp.int32)
        prefix = Prefix(kv, positions, ones)
        light, previous = self.light, tokens[:, -1:]
        state = hidden[:, -1:] if light is not None and light.teacher_state else None
        logits = self.denoise(
            tokens[:, None], starts, ones[:, :1], prefix, previous=previous, teacher_state=state
        )
        if light is not None and light.serial_rank:
            logits += jnp.mean(self.serial_logits(previous))  # creates its parameters
        return logits[:, 0]


def _behind(
    first: Shaped[Array, '...'], rest: Shaped[Array, '*B'], axis: int
) -> Shaped[Array, '*B']:
    """`first` and all of `rest` but its last element along `axis`."""
    kept = jax.lax.slice_in_dim(rest, 0, rest.shape[axis] - 1, axis=axis)
    return jnp.concatenate([first, kept], axis=axis)
