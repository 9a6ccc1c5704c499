"""DiffusionGemma: a Gemma backbone with an encode and a denoise pass."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.backbone import ACTIVATION_AXES, Backbone, PassContext
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.config import LIGHT, SEPARATE, LightConfig, ModelConfig
from diffusiongemma.models.execution import Execution, native_dtype
from diffusiongemma.models.layers import GatedMLP, RMSNorm, rms_normalize, weight
from diffusiongemma.models.light import LightBackbone, SerialCorrection, TeacherState
from diffusiongemma.models.masks import AttentionMask, CausalMask, canvas_mask
from diffusiongemma.models.transformer import Gemma, rope_by_kind

# Parameters that only the denoise pass uses; a separate or light denoiser trains only these.
DENOISER_ALONE = ('denoise_backbone', 'self_conditioning', 'teacher_state', 'serial')
DRAFT_IDS = 'draft_ids'  # tokens of the draft vocabulary, int32 [Vd] in increasing order
DRAFT_HEAD = 'draft_head'  # embedding rows of these tokens, with `Execution.gather_draft_head`


class SelfConditioning(nn.Module):
    """A module that adds the predictions of the previous denoise step to the canvas embeddings.

    h = rmsnorm(embed(canvas) + mlp(rmsnorm(soft embeddings))), where the outer norm has no scale.
    The output of the MLP is zero-initialized, so that a new student ignores it.
    """

    config: ModelConfig
    dtype: jnp.dtype
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, '*B D'], soft_embeddings: Float[Array, '*B D'] | None
    ) -> Float[Array, '*B D']:
        """Returns inputs [..., D] for embeddings [..., D] and soft embeddings [..., D] or None."""
        config = self.config
        if soft_embeddings is None:
            soft_embeddings = jnp.zeros_like(embeddings)
        norm = RMSNorm(config.norm_eps, config.norm_scale_offset, name='pre_norm')
        mlp = GatedMLP(
            config.width,
            config.ffn_width,
            self.dtype,
            self.execution,
            zero_init_output=True,
            name='mlp',
        )
        combined = embeddings + mlp(norm(soft_embeddings.astype(self.dtype)))
        return rms_normalize(combined, config.norm_eps).astype(self.dtype)


class DiffusionGemma(Gemma):
    """A Gemma with a denoise pass; `encode` is the causal pass of its parent class.

    Both passes share all weights except for the layer scalars (as released), or the denoise pass
    has separate layers: see `DenoiserConfig.kind`.
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
        backbone: Any  # its inputs and outputs depend on the kind
        if config.kind == SEPARATE:
            backbone = Backbone(config.autoregressive, dtype, self.execution)
            self.denoise_backbone = backbone
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
        """Returns the config of a light denoiser; None for other kinds."""
        return self.config.light

    @property
    def denoise_dtype(self) -> jnp.dtype:
        """Returns the compute dtype of the denoise pass on the current devices."""
        if self.config.has_frozen_encoder and self.execution.denoise_dtype is not None:
            return native_dtype(self.execution.denoise_dtype, self.execution.platform)
        dtype: jnp.dtype = jnp.dtype(self.dtype)
        return dtype

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
        """Runs the denoise pass over M canvases per row (sampling: M = 1), without the head.

        Args:
          canvas: [B, M, C] int32, noisy tokens.
          starts: [B, M] int32, the position of each canvas's first token.
          segment_ids: [B, M] int32, the document of each canvas; 0 for an unused slot.
          prefix: the clean tokens, as a cache or as the K/V of a packed training row.
          soft_embeddings: [B, M, C, D] from `soft_embed`, or None at the first step; ignored
            without `config.self_conditioning`.
          previous: [B, M] int32, the token before each canvas; only used, and required, with
            `config.predict_next`.
          teacher_state: [B, M, D], the encode pass's final hidden state of the last prefix token
            before each canvas, for a light denoiser that reads it.

        Returns:
          Final hidden states [B, M, C, D].

        Raises:
          ValueError: if the model needs `previous` or `teacher_state`, and it is None.
        """
        if not self.config.self_conditioning:
            soft_embeddings = None
        if self.config.predict_next:
            if previous is None:
                raise ValueError('a model with predict_next needs the token before each canvas.')
            canvas = _shifted(previous[..., None], canvas, axis=-1)
            starts = starts - 1
            if soft_embeddings is not None:
                zeros = jnp.zeros_like(soft_embeddings[..., :1, :])
                soft_embeddings = _shifted(zeros, soft_embeddings, axis=-2)
        length = canvas.shape[-1]
        masks: dict[str, AttentionMask | CausalMask] = {
            kind: canvas_mask(starts, segment_ids, length, keys, self.config.attention(kind).window)
            for kind, keys in prefix.tokens_by_kind(self.config).items()
        }
        positions = starts[..., None] + jnp.arange(length)  # [B, M, C]
        context = PassContext(rope_by_kind(self.config, positions), masks)
        embeddings = self.embedder.encode(canvas).astype(self.denoise_dtype)  # [B, M, C, D]
        embeddings = self.execution.constrain(embeddings, *ACTIVATION_AXES)
        x = embeddings
        # A light denoiser without self-conditioning gets the same embeddings as the teacher.
        if self.light is None or self.config.self_conditioning:
            x = self.self_conditioning(embeddings, soft_embeddings)
        per_layer = self.per_layer_inputs(canvas, x)  # [B, M, C, layers, P] or None
        hidden: jax.Array
        if self.light is not None:
            if self.light.teacher_state:
                if teacher_state is None:
                    raise ValueError("a light denoiser needs the teacher's state of each canvas.")
                x = self.teacher_state(x, teacher_state)
            hidden = self.denoise_backbone(x, prefix.kv, context, per_layer)
        elif self.config.kind == SEPARATE:
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
        """Runs `denoise_hidden` and the head; returns float32 logits [B, M, C, V].

        Tokens outside of a draft vocabulary have logits of -inf. The serial correction is not
        included, because it needs the previous tokens, see `serial_logits`.
        """
        args = (canvas, starts, segment_ids, prefix, soft_embeddings, previous, teacher_state)
        logits = self.draft_logits(self.denoise_hidden(*args))  # [B, M, C, Vd or V]
        if self.light is None or not self.light.draft_vocab_size:
            return logits
        all_logits = jnp.full((*logits.shape[:-1], self.config.vocab_size), -jnp.inf, logits.dtype)
        return all_logits.at[..., self.draft_ids].set(logits)

    def draft_logits(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B Vd']:
        """Returns float32 soft-capped logits of hidden states [..., D].

        Their shape is [..., Vd] with a draft vocabulary, else [..., V].
        """
        if self.light is None or not self.light.draft_vocab_size:
            return self.unembed(hidden)
        return self.embedder.decode(hidden, self.draft_table())

    def score_tokens(
        self, hidden: Float[Array, 'B K D'], tokens: Int[Array, 'B P']
    ) -> Float[Array, 'B K P']:
        """Returns the logits of some tokens: [B, K, D], [B, P] int32 -> float32 [B, K, P]."""

        def score_row(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
            return self.embedder.decode(hidden, self.embedder.embedding[tokens])  # [K, P]

        return jax.vmap(score_row)(hidden, tokens)

    def draft_table(self) -> Float[Array, 'Vd D']:
        """Returns the embedding rows [Vd, D] of the draft vocabulary's tokens."""
        if self.execution.gather_draft_head:
            table: jax.Array = self.draft_head
            return table
        return jnp.take(self.embedder.embedding, self.draft_ids, axis=0)

    def draft_rows(self, tokens: Int[Array, '*B']) -> tuple[Int[Array, '*B'], Bool[Array, '*B']]:
        """Returns the indices of tokens [...] in the draft vocabulary, and whether they are in it.

        The index is Vd for other tokens. Without a draft vocabulary the index is the token itself.
        """
        if self.light is None or not self.light.draft_vocab_size:
            return tokens, jnp.ones(tokens.shape, bool)
        size = self.light.draft_vocab_size
        place = jnp.searchsorted(self.draft_ids, tokens).astype(jnp.int32)
        known = jnp.take(self.draft_ids, jnp.minimum(place, size - 1)) == tokens
        return jnp.where(known, place, size), known

    def draft_tokens(self, rows: Int[Array, '*B']) -> Int[Array, '*B']:
        """Returns the tokens at indices [...] of the draft vocabulary (inverse of `draft_rows`)."""
        if self.light is None or not self.light.draft_vocab_size:
            return rows
        return jnp.take(self.draft_ids, rows)

    def serial_logits(self, previous: Int[Array, '*B']) -> Float[Array, '*B Vd']:
        """Returns the serial correction for previous tokens: [...] int32 -> [..., Vd] float32.

        It is added to the logits of a draft; only for a light denoiser with `serial_rank` > 0.
        """
        return self.serial(self.draft_rows(previous)[0])

    def soft_embed(
        self, logits: Float[Array, '*B V'], log_z: Float[Array, '*B'] | None = None
    ) -> Float[Array, '*B D']:
        """Returns softmax(logits) @ embedding * sqrt(D), [..., V] -> [..., D].

        This is the input of self-conditioning. `log_z` is logsumexp(logits) if it is known.
        """
        return self.embedder.soft_encode(logits, self.denoise_dtype, log_z)

    def __call__(self, tokens: Int[Array, 'B C']) -> Float[Array, 'B C V']:
        """Returns denoise logits [B, C, V] for tokens [B, C] as prefix and canvas; for `init`."""
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
            logits += jnp.mean(self.serial_logits(previous))  # creates the parameters
        return logits[:, 0]


def model_for(config: ModelConfig, dtype: Any = jnp.float32) -> Gemma:
    """Returns the module of a config: a DiffusionGemma if it has a denoiser, else a Gemma."""
    return (DiffusionGemma if config.is_diffusion else Gemma)(config, dtype)


def _shifted(
    first: Shaped[Array, '...'], sequence: Shaped[Array, '*B'], axis: int
) -> Shaped[Array, '*B']:
    """Returns `first` followed by all but the last element of `sequence` along `axis`."""
    without_last = jax.lax.slice_in_dim(sequence, 0, sequence.shape[axis] - 1, axis=axis)
    return jnp.concatenate([first, without_last], axis=axis)
