"""What a canvas is told (CanvasTask), what sampling carries (the two states) and returns
(SamplerOutput)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from diffusiongemma.constraints.automaton import TokenAutomaton, advance
from diffusiongemma.models.arrays import AnyArray, Array
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import Controls, traced
from diffusiongemma.sampling.finite import first_failure
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.scores import TokenScores


@flax.struct.dataclass
class SamplerOutput:
    """Responses, and what they cost.

    Attributes:
      tokens: [B, max_new_tokens] int32, pad id behind a response's end.
      lengths: [B] int32, tokens of each response, its stop token included.
      denoising_steps: [B] int32, denoise passes over all canvases of a row, without the
        prefill and the commits. Autoregressive: passes that gave a token, the prefill included.
      canvases: [B] int32, canvases that a row took (lossless: drafts); 0 when autoregressive.
      causal_passes: [B] int32, causal passes after the prefill that a row took: commits of
        canvases that others follow, or verifications; 0 when autoregressive.
      failed_pass: [B] int32, 0, or which pass gave logits that are NaN or infinite, see
        `finite.PASSES`; such a row ends before that pass. A call of `Sampler` raises an error.
      accepted_lengths: [B, K + 2] int32, in the lossless mode: after how many verifications 0, 1,
        .., K + 1 tokens were emitted, the pending one counted. None in the other modes.
      scores: of the tokens, [B, max_new_tokens], where the config asks for `logprobs`; else None.
    """

    tokens: Int[AnyArray, 'B T']
    lengths: Int[AnyArray, ' B']
    denoising_steps: Int[AnyArray, ' B']
    canvases: Int[AnyArray, ' B']
    causal_passes: Int[AnyArray, ' B']
    failed_pass: Int[AnyArray, ' B']
    accepted_lengths: Int[AnyArray, 'B K'] | None = None
    scores: TokenScores | None = None

    @property
    def tokens_per_denoise_pass(self) -> Float[AnyArray, ' B']:
        """[B] float32; 1 when autoregressive."""
        return self.lengths / jnp.maximum(self.denoising_steps, 1)

    @property
    def tokens_per_pass(self) -> Float[AnyArray, ' B']:
        """[B] float32, denoise passes, commits and verifications counted; the prefill is not."""
        return self.lengths / jnp.maximum(self.denoising_steps + self.causal_passes, 1)


@flax.struct.dataclass
class CanvasTask:
    """One canvas of every row: what its denoise steps need to know, and none of them changes.

    Attributes:
      keys: [B] random keys of this canvas.
      active: [B] bool; the other rows take no step.
      last_token: [B] int32, the token before the canvas.
      pinned: [B, C] int32, the token that a position holds throughout, -1 where it is open.
      seed: [B, C] int32, tokens to start from, -1 for noise.
      allowed: bool that broadcasts to [B, C, V], tokens that a position may hold.
      temperature: [B] float32 in place of the config's.
      top_p: [B] float32 in place of the config's.
      max_steps: [B] int32, limit of each row's steps beside the config's.
      automaton: of the valid responses.
      automaton_states: [B] int32, states before the canvas.
      remaining: [B] int32, tokens that each response may still have.
      text_noise: [B, C, V] float32, Gumbel noise that the text at these places is drawn with; a
        draft that is drawn with the same is accepted more often.
      teacher_state: [B, D], hidden state of the last encoded token, for a light denoiser.
      length: C, where it is not the model's.
      first: tokens between the cached ones and the canvas: 1 where the token before the canvas
        is pending, that is not cached yet.
    """

    keys: Key[Array, ' B']
    active: Bool[Array, ' B']
    last_token: Int[Array, ' B']
    pinned: Int[Array, 'B C'] | None = None
    seed: Int[Array, 'B C'] | None = None
    allowed: Bool[Array, '#B #C V'] | None = None
    temperature: Float[Array, ' B'] | None = None
    top_p: Float[Array, ' B'] | None = None
    max_steps: Int[Array, ' B'] | None = None
    automaton: TokenAutomaton | None = None
    automaton_states: Int[Array, ' B'] | None = None
    remaining: Int[Array, ' B'] | None = None
    text_noise: Float[Array, 'B C V'] | None = None
    teacher_state: Float[Array, 'B D'] | None = None
    length: int | None = flax.struct.field(pytree_node=False, default=None)
    first: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class DenoiseState:
    """The inner loop's carry: one canvas of every row.

    Attributes:
      step: [] int32, n, denoise steps taken.
      canvas: [B, C] int32, noisy tokens that the next step reads.
      argmax_history: [B, W, C] int32, argmax canvases of the latest W steps, the newest last;
        -1 before the first step. W is the stopping rule's.
      entropies: [B, C] float32, of the latest step's predictions in nats.
      soft_embeddings: [B, C, D], self-conditioning of the next step.
      stopped: [B] bool; such a row keeps all of the above.
      steps: [B] int32, denoise steps that a row took before it stopped.
      finite: [B] bool, whether the logits of all of these steps were finite; where not, the row
        is stopped.
      rule_state: of the acceptance rule; None where it has none.
    """

    step: Int[Array, '']
    canvas: Int[Array, 'B C']
    argmax_history: Int[Array, 'B W C']
    entropies: Float[Array, 'B C']
    soft_embeddings: Float[Array, 'B C D']
    stopped: Bool[Array, ' B']
    steps: Int[Array, ' B']
    finite: Bool[Array, ' B']
    rule_state: Any = None

    @property
    def argmax(self) -> Int[Array, 'B C']:
        """[B, C] int32, the most likely tokens of the latest step."""
        return self.argmax_history[:, -1]

    def result(self, config: SamplingConfig) -> Int[Array, 'B C']:
        """[B, C] int32, the canvas that is committed."""
        return self.argmax if config.commits == 'argmax' else self.canvas


@flax.struct.dataclass
class GenerationState:
    """The outer loop's carry, of every decode mode.

    Attributes:
      cache: keys and values of the prompts and of what has been committed.
      keys: [B] random keys, one stream per row.
      controls: what the call asks of the rows.
      last_token: [B] int32, each row's latest token: of its response, else of its prompt.
      tokens: [B, max_new_tokens] int32, responses so far, pad id elsewhere.
      lengths: [B] int32, tokens of the responses so far.
      limits: [B] int32, the most tokens that each response may have.
      finished: [B] bool, stop token or length limit reached; such a row never changes again.
      denoising_steps: [B] int32, as in SamplerOutput.
      canvases: [B] int32, as in SamplerOutput.
      causal_passes: [B] int32, as in SamplerOutput.
      failed_pass: [B] int32, as in SamplerOutput; where it is not 0 the row is finished.
      automaton_states: [B] int32, after the responses so far; None without an automaton.
      scores: as in SamplerOutput.
    """

    cache: KVCache
    keys: Key[Array, ' B']
    controls: Controls
    last_token: Int[Array, ' B']
    tokens: Int[Array, 'B T']
    lengths: Int[Array, ' B']
    limits: Int[Array, ' B']
    finished: Bool[Array, ' B']
    denoising_steps: Int[Array, ' B']
    canvases: Int[Array, ' B']
    causal_passes: Int[Array, ' B']
    failed_pass: Int[Array, ' B']
    automaton_states: Int[Array, ' B'] | None
    scores: TokenScores | None = None

    @classmethod
    def create(
        cls,
        config: SamplingConfig,
        cache: KVCache,
        last_token: Int[Array, ' B'],
        keys: Key[Array, ' B'],
        controls: Controls,
    ) -> 'GenerationState':
        """Empty responses behind the cached tokens, the last of which are last_token [B]."""
        zeros, width = jnp.zeros_like(last_token), config.max_new_tokens
        logprobs = config.logprobs
        limits = zeros + width
        if controls.max_new_tokens is not None:
            limits = jnp.minimum(limits, controls.max_new_tokens)
        return cls(
            cache=cache,
            keys=keys,
            controls=controls,
            last_token=last_token,
            tokens=jnp.full((zeros.size, width), config.pad_id, jnp.int32),
            lengths=zeros,
            limits=limits,
            finished=limits == 0,
            denoising_steps=zeros,
            canvases=zeros,
            causal_passes=zeros,
            failed_pass=zeros,
            automaton_states=controls.start_states(zeros.size),
            scores=None if logprobs is None else TokenScores.empty(zeros.size, width, logprobs),
        )

    def temperature(self, config: SamplingConfig) -> float | Float[Array, ' B']:
        """The config's number, or one per row [B]."""
        given = traced(self.controls.temperature)
        return config.temperature if given is None else given

    def top_p(self, config: SamplingConfig) -> float | Float[Array, ' B'] | None:
        """The config's number, or one per row [B]."""
        given = traced(self.controls.top_p)
        return config.top_p if given is None else given

    @property
    def running(self) -> Bool[Array, '']:
        """[] bool, some row is unfinished."""
        return ~jnp.all(self.finished)

    def finish_unless(self, finite: Bool[Array, ' B'], name: str) -> 'GenerationState':
        """Ends the unfinished rows in which the logits of a pass are not `finite` [B] bool."""
        failed = first_failure(self.failed_pass, name, ~self.finished & ~finite)
        finished = self.finished | (failed > 0)
        return dataclasses.replace(self, failed_pass=failed, finished=finished)

    def emit(
        self,
        config: SamplingConfig,
        block: Int[Array, 'B T'],
        passes: int | Int[Array, ''] | Int[Array, ' B'],
        counts: Int[Array, ' B'] | None = None,
        scores: TokenScores | None = None,
    ) -> 'GenerationState':
        """Appends a block of tokens to the responses of the unfinished rows.

        A response ends with its first stop token, or at its limit.

        Args:
          config: stop ids.
          block: [B, T] int32.
          passes: [B] int32 or scalar, denoise passes that the block took.
          counts: [B] int32, tokens of the block that count; None for all.
          scores: of the block [B, T], where the config asks for them.
        """
        offsets = jnp.arange(block.shape[1])
        room = self.limits - self.lengths
        counts = jnp.minimum(block.shape[1] if counts is None else counts, room)
        stops = jnp.any(block[..., None] == jnp.asarray(config.stop_ids, jnp.int32), axis=-1)
        stops &= offsets < counts[:, None]
        stopped = jnp.any(stops, axis=-1)
        counts = jnp.where(stopped, jnp.argmax(stops, axis=-1) + 1, counts)
        counts = jnp.where(self.finished, 0, counts)  # [B]
        slots = self.lengths[:, None] + offsets
        slots = jnp.where(offsets < counts[:, None], slots, self.tokens.shape[1])
        rows = jnp.arange(block.shape[0])[:, None]
        latest = jnp.take_along_axis(block, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
        lengths = self.lengths + counts
        states, automaton = self.automaton_states, self.controls.automaton
        if states is not None and automaton is not None:
            states = advance(automaton, states, block, counts)

        def put(kept: jax.Array, new: jax.Array) -> jax.Array:
            return kept.at[rows, slots].set(new, mode='drop')

        return dataclasses.replace(
            self,
            automaton_states=states,
            scores=jax.tree.map(put, self.scores, scores),
            last_token=jnp.where(counts > 0, latest, self.last_token),
            tokens=put(self.tokens, block),
            lengths=lengths,
            finished=self.finished | stopped | (lengths >= self.limits),
            denoising_steps=self.denoising_steps + jnp.where(self.finished, 0, passes),
        )

    def insert(self, new: 'GenerationState', slots: Int[Array, ' R']) -> 'GenerationState':
        """Puts the rows of another state, of the same capacity, in the place of some of these.

        Args:
          new: R rows.
          slots: [R] int32, the row that each of them replaces; a slot >= B drops it.
        """

        def put(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[slots].set(rows, mode='drop')

        def put_kv(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[..., slots, :, :, :].set(rows, mode='drop')

        cache = KVCache(
            kv=jax.tree.map(put_kv, self.cache.kv, new.cache.kv),
            lengths=put(self.cache.lengths, new.cache.lengths),
        )
        controls = self.controls.map_rows(put, new.controls)
        return map_but(put, self, new, cache=cache, controls=controls)

    def output(self) -> SamplerOutput:
        return SamplerOutput(
            tokens=self.tokens,
            lengths=self.lengths,
            denoising_steps=self.denoising_steps,
            canvases=self.canvases,
            causal_passes=self.causal_passes,
            failed_pass=self.failed_pass,
            scores=self.scores,
        )
