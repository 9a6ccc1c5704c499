"""The inputs of a canvas (CanvasTask), the loop states, and the results (SamplerOutput)."""

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
    """The responses of a sampler with their pass counts.

    Attributes:
      tokens: [B, max_new_tokens] int32, with the pad id after the end of a response.
      lengths: [B] int32, the number of tokens of each response, including its stop token.
      denoising_steps: [B] int32, the number of denoise passes over all canvases of a row, without
        prefill and commits. In autoregressive mode: passes that emitted a token, including the
        prefill.
      canvases: [B] int32, the number of canvases (lossless: drafts); 0 in autoregressive mode.
      causal_passes: [B] int32, the number of causal passes after the prefill: commits of all
        canvases but the last, or verifications; 0 in autoregressive mode.
      failed_pass: [B] int32, 0, or the code of the pass with NaN or infinite logits, see
        `finite.PASSES`; such a row ends before that pass. A call of `Sampler` raises an error.
      accepted_lengths: [B, K + 2] int32, in the lossless mode the numbers of verifications that
        emitted 0, 1, .., K + 1 tokens, including the bonus token. None in other modes.
      scores: the scores of the tokens, [B, max_new_tokens], if the config sets `logprobs`; else
        None.
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
        """Returns tokens per denoise pass, [B] float32; 1 in autoregressive mode."""
        return self.lengths / jnp.maximum(self.denoising_steps, 1)

    @property
    def tokens_per_pass(self) -> Float[AnyArray, ' B']:
        """Returns tokens per pass, [B] float32; all passes except the prefill are counted."""
        return self.lengths / jnp.maximum(self.denoising_steps + self.causal_passes, 1)


@flax.struct.dataclass
class CanvasTask:
    """The constant inputs of all denoise steps of one canvas per row.

    Attributes:
      keys: [B] random keys of this canvas.
      active: [B] bool; other rows take no steps.
      last_token: [B] int32, the token before the canvas.
      pinned: [B, C] int32, the fixed token of a position, or -1.
      seed: [B, C] int32, the initial token of a position, or -1 for noise.
      allowed: bool that broadcasts to [B, C, V], the tokens that are allowed at a position.
      temperature: [B] float32, overrides that of the config.
      top_p: [B] float32, overrides that of the config.
      max_steps: [B] int32, an additional limit on the number of steps of each row.
      automaton: the automaton of valid responses.
      automaton_states: [B] int32, the states before the canvas.
      remaining: [B] int32, the number of tokens that each response may still have.
      text_noise: [B, C, V] float32, the Gumbel noise of the text at these positions; a draft that
        uses the same noise is accepted more often.
      teacher_state: [B, D], the hidden state of the last encoded token, for a light denoiser.
      length: C, if it differs from the canvas length of the model.
      first: the number of tokens between the cached ones and the canvas: 1 if the token before the
        canvas is pending, that is, not cached yet.
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
    """The carry of the inner loop: one canvas per row.

    Attributes:
      step: [] int32, n, the number of denoise steps so far.
      canvas: [B, C] int32, the noisy tokens that the next step reads.
      argmax_history: [B, W, C] int32, the argmax canvases of the latest W steps, the newest last;
        -1 before the first step. The stopping rule determines W.
      entropies: [B, C] float32, the entropies of the latest predictions in nats.
      soft_embeddings: [B, C, D], the self-conditioning input of the next step.
      stopped: [B] bool; the fields above no longer change for stopped rows.
      steps: [B] int32, the number of denoise steps of each row before it stopped.
      finite: [B] bool, whether the logits of all steps were finite; other rows are stopped.
      rule_state: the state of the acceptance rule; None for a stateless rule.
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
        """Returns the argmax canvas of the latest step, [B, C] int32."""
        return self.argmax_history[:, -1]

    def result(self, config: SamplingConfig) -> Int[Array, 'B C']:
        """Returns the canvas to commit, [B, C] int32."""
        return self.argmax if config.commits == 'argmax' else self.canvas


@flax.struct.dataclass
class GenerationState:
    """The carry of the outer loop, in every decode mode.

    Attributes:
      cache: the keys and values of prompts and committed tokens.
      keys: [B] random keys, one stream per row.
      controls: the settings and constraints of the rows.
      last_token: [B] int32, the latest token of each response, or the last prompt token.
      tokens: [B, max_new_tokens] int32, the responses so far, with the pad id elsewhere.
      lengths: [B] int32, the number of tokens of the responses so far.
      limits: [B] int32, the maximum number of tokens of each response.
      finished: [B] bool, whether a row reached a stop token or its limit; it no longer changes.
      denoising_steps: [B] int32, see SamplerOutput.
      canvases: [B] int32, see SamplerOutput.
      causal_passes: [B] int32, see SamplerOutput.
      failed_pass: [B] int32, see SamplerOutput; rows with a nonzero code are finished.
      automaton_states: [B] int32, the states after the responses so far; None without an automaton.
      scores: see SamplerOutput.
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
        """Returns a state with empty responses after cached prompts that end in last_token [B]."""
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
        """Returns the temperature of the config, or that of each row [B]."""
        temperature = traced(self.controls.temperature)
        return config.temperature if temperature is None else temperature

    def top_p(self, config: SamplingConfig) -> float | Float[Array, ' B'] | None:
        """Returns top_p of the config, or that of each row [B]."""
        top_p = traced(self.controls.top_p)
        return config.top_p if top_p is None else top_p

    @property
    def running(self) -> Bool[Array, '']:
        """Returns whether any row is unfinished, [] bool."""
        return ~jnp.all(self.finished)

    def finish_unless(self, finite: Bool[Array, ' B'], name: str) -> 'GenerationState':
        """Finishes the rows in which the logits of a pass are not `finite` [B] bool."""
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
          config: the sampling settings with the stop ids.
          block: [B, T] int32, the tokens to append.
          passes: [B] int32 or scalar, the number of denoise passes for the block.
          counts: [B] int32, the number of valid tokens of the block; None for all.
          scores: the scores of the block [B, T], if the config sets `logprobs`.
        """
        offsets = jnp.arange(block.shape[1])
        room = self.limits - self.lengths
        counts = jnp.minimum(block.shape[1] if counts is None else counts, room)
        stops = jnp.any(block[..., None] == jnp.asarray(config.stop_ids, jnp.int32), axis=-1)
        stops &= offsets < counts[:, None]  # [B, T], among the valid tokens
        stopped = jnp.any(stops, axis=-1)
        counts = jnp.where(stopped, jnp.argmax(stops, axis=-1) + 1, counts)
        counts = jnp.where(self.finished, 0, counts)  # [B]
        columns = self.lengths[:, None] + offsets  # [B, T], places in `tokens`
        dropped = self.tokens.shape[1]  # a column that does not exist
        columns = jnp.where(offsets < counts[:, None], columns, dropped)
        rows = jnp.arange(block.shape[0])[:, None]
        latest = jnp.take_along_axis(block, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
        lengths = self.lengths + counts
        states, automaton = self.automaton_states, self.controls.automaton
        if states is not None and automaton is not None:
            states = advance(automaton, states, block, counts)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, columns].set(new, mode='drop')

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
        """Replaces some rows by the rows of another state with the same capacity.

        Args:
          new: a state with R rows.
          slots: [R] int32, the row that each new row replaces; rows with a slot >= B are dropped.
        """

        def put(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[slots].set(rows, mode='drop')  # [B, ...]

        def put_kv(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[..., slots, :, :, :].set(rows, mode='drop')  # [..., B, K, S, H]

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
