"""What sampling is told (SamplingConfig, CanvasTask), carries (the two states) and returns
(SamplerOutput)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import TokenAutomaton, advance
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling.acceptance import AcceptanceRule, Ancestral, EntropyBound
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafts import DraftSource
from diffusiongemma.sampling.finite import first_failure
from diffusiongemma.sampling.rules import RULES, read_rule
from diffusiongemma.sampling.schedule import TemperatureSchedule
from diffusiongemma.sampling.stopping import Never, StableAndConfident, StoppingRule


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Frozen and hashable; the defaults are those of the released models.

    Attributes:
      max_new_tokens: length limit of a response; need not be a multiple of the canvas length.
      max_denoising_steps: T, limit of denoise steps per canvas.
      drafts: a source of drafts for the lossless mode, such as `PromptLookup`, or its text, such
        as 'PromptLookup(length=8)'; None for the model's own denoiser.
      lookup_ngram: in the lossless mode, a draft is what followed the last so many tokens (or
        more) where they occur earlier in the text, and the model's own elsewhere; 0 for the
        model's alone. Code and other text that repeats itself gains from it.
      draft_length: canvas tokens of a draft in the lossless mode, at most the model's canvas
        length; None for all of it. Short drafts are verified faster.
      max_draft_steps: limit of denoise steps per draft in the lossless mode. A row whose draft
        fell early takes one step more for the next, one whose draft held wholly one less.
      entropy_bound: nats, bound of the `EntropyBound` acceptance; None for 0.1. Not beside
        another `acceptance`.
      t_min: temperature towards the last denoise step.
      t_max: temperature of the first denoise step.
      temperature_exponent: how the temperature falls between them, see `TemperatureSchedule`.
      stability_threshold: previous steps that must agree, see `StableAndConfident`; None for 1.
        Not beside `stopping`.
      confidence_threshold: mean entropy in nats, see `StableAndConfident`; None for 0.005. Not
        beside `stopping`.
      temperature: factor on the schedule's temperatures, and the softmax temperature of the
        autoregressive mode. 0 is greedy: the candidates are the most likely tokens, while the
        entropies are still those of the schedule's distribution.
      top_k: candidates, and tokens of the autoregressive mode, are drawn from the k likeliest
        tokens; None from all. Entropies and confidences are those of the whole distribution.
      top_p: likewise, from the fewest likeliest tokens whose probability reaches p.
      stop_ids: tokens that end a response. The default is the <eos> of Gemma's vocabularies;
        a chat model ends its turn with another one, see `for_tokenizer`. () never stops.
      pad_id: fills the output behind a response's end.
      vocab_size: noise is uniform over token ids below it; None for the model's vocabulary.
      prefill_chunk: prompts are encoded so many tokens at a time, for long ones whose attention
        would not fit in memory; None for all at once.
      commits: 'argmax', the argmax canvas of the last step, or 'canvas', what the acceptance
        rule made of it.
      acceptance: a rule that replaces the entropy bound, or its text, such as 'TopK(k=4)'.
      stopping: a rule that replaces stability and confidence, or its text, such as 'Never()'.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    drafts: DraftSource | None = None
    lookup_ngram: int = 0
    draft_length: int | None = None
    max_draft_steps: int = 1
    entropy_bound: float | None = None
    t_min: float = 0.4
    t_max: float = 0.8
    temperature_exponent: float = 1.0
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_ids: tuple[int, ...] = (1,)
    pad_id: int = 0
    vocab_size: int | None = None
    prefill_chunk: int | None = None
    commits: str = 'argmax'
    acceptance: AcceptanceRule | None = None
    stopping: StoppingRule | None = None

    def __post_init__(self):
        object.__setattr__(self, 'stop_ids', tuple(int(i) for i in self.stop_ids))
        if self.max_new_tokens < 1:
            raise ValueError(
                f'max_new_tokens must be >= 1, got {self.max_new_tokens}; '
                'it is the longest response that you want.'
            )
        if self.max_denoising_steps < 1:
            raise ValueError(
                f'max_denoising_steps must be >= 1, got {self.max_denoising_steps}; '
                'the released models use 48.'
            )
        if self.max_draft_steps < 1:
            raise ValueError(f'max_draft_steps must be >= 1, got {self.max_draft_steps}.')
        if self.lookup_ngram < 0:
            raise ValueError(
                f'lookup_ngram must be >= 0 tokens, got {self.lookup_ngram}; 0 looks nothing up.'
            )
        if self.lookup_ngram and self.drafts is not None:
            raise ValueError(
                'drafts and lookup_ngram are both given: use one of them; lookup_ngram drafts with '
                'the model where nothing is found.'
            )
        if self.draft_length is not None and self.draft_length < 2:
            raise ValueError(
                f'draft_length must be >= 2 canvas tokens, got {self.draft_length}; None takes the '
                "model's canvas length."
            )
        if not 0 <= self.temperature < float('inf'):
            raise ValueError(
                f'temperature must be finite and >= 0, got {self.temperature}; '
                'use 0 for greedy decoding, 1 for the schedule as it is.'
            )
        if self.pad_id < 0 or min(self.stop_ids, default=0) < 0:
            raise ValueError(
                f'pad_id and stop_ids are token ids >= 0, got {self.pad_id} and {self.stop_ids}; '
                'SamplingConfig.for_tokenizer fills them in.'
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(
                f"vocab_size must be >= 1, got {self.vocab_size}; use None for the model's own."
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ValueError(
                f'prefill_chunk must be >= 1, got {self.prefill_chunk}; '
                'use None to encode prompts in one pass.'
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f'top_k must be >= 1 token, got {self.top_k}; None keeps all.')
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f'top_p must lie in (0, 1], got {self.top_p}; None keeps all tokens.')
        if self.commits not in ('argmax', 'canvas'):
            raise ValueError(f"commits must be 'argmax' or 'canvas', got {self.commits!r}.")
        for name in RULES:
            object.__setattr__(self, name, read_rule(name, getattr(self, name)))
        self._check_one_rule('acceptance', 'entropy_bound')
        self._check_one_rule('stopping', 'stability_threshold')
        self._check_one_rule('stopping', 'confidence_threshold')
        # These check the numbers that they are made of.
        _ = self.schedule, self.acceptance_rule, self.stopping_rule

    def _check_one_rule(self, rule: str, number: str) -> None:
        """Raises ValueError where a number is given that a rule beside it leaves without effect."""
        replaced, value = getattr(self, rule), getattr(self, number)
        if value is not None and replaced is not None and value != getattr(replaced, number, None):
            raise ValueError(
                f'{number}={value} has no effect beside {rule}={replaced!r}, which replaces it. '
                'Leave one of them out (None).'
            )

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, **fields: Any) -> 'SamplingConfig':
        """A config with the tokenizer's `stop_ids`, `pad_id` and `vocab_size`.

        Args:
          tokenizer: a `diffusiongemma.data.tokenizer.Tokenizer`.
          **fields: any other field, or another value for one of these three.
        """
        return cls(**(cls.tokenizer_fields(tokenizer) | fields))

    @staticmethod
    def tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
        """The fields that a tokenizer decides."""
        return {
            'stop_ids': tokenizer.stop_ids,
            'pad_id': tokenizer.pad_id,
            'vocab_size': tokenizer.vocab_size,
        }

    @classmethod
    def ancestral(cls, **fields: Any) -> 'SamplingConfig':
        """Ancestral sampling of the diffusion process: all steps, at temperature 1, as drawn."""
        exact = {'acceptance': Ancestral(), 'stopping': Never(), 'commits': 'canvas'}
        return cls(**(exact | {'t_min': 1.0, 't_max': 1.0} | fields))

    @property
    def schedule(self) -> TemperatureSchedule:
        return TemperatureSchedule(
            self.t_min, self.t_max, self.max_denoising_steps, self.temperature_exponent
        )

    @property
    def acceptance_rule(self) -> AcceptanceRule:
        if self.acceptance is not None:
            return self.acceptance
        return EntropyBound() if self.entropy_bound is None else EntropyBound(self.entropy_bound)

    @property
    def stopping_rule(self) -> StoppingRule:
        if self.stopping is not None:
            return self.stopping
        numbers = {
            'stability_threshold': self.stability_threshold,
            'confidence_threshold': self.confidence_threshold,
        }
        return StableAndConfident(**{k: v for k, v in numbers.items() if v is not None})


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
    """

    tokens: jax.Array
    lengths: jax.Array
    denoising_steps: jax.Array
    canvases: jax.Array
    causal_passes: jax.Array
    failed_pass: jax.Array
    accepted_lengths: jax.Array | None = None

    @property
    def tokens_per_denoise_pass(self) -> jax.Array:
        """[B] float32; 1 when autoregressive."""
        return self.lengths / jnp.maximum(self.denoising_steps, 1)

    @property
    def tokens_per_pass(self) -> jax.Array:
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

    keys: jax.Array
    active: jax.Array
    last_token: jax.Array
    pinned: jax.Array | None = None
    seed: jax.Array | None = None
    allowed: jax.Array | None = None
    temperature: jax.Array | None = None
    top_p: jax.Array | None = None
    max_steps: jax.Array | None = None
    automaton: TokenAutomaton | None = None
    automaton_states: jax.Array | None = None
    remaining: jax.Array | None = None
    text_noise: jax.Array | None = None
    teacher_state: jax.Array | None = None
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
    """

    step: jax.Array
    canvas: jax.Array
    argmax_history: jax.Array
    entropies: jax.Array
    soft_embeddings: jax.Array
    stopped: jax.Array
    steps: jax.Array
    finite: jax.Array

    @property
    def argmax(self) -> jax.Array:
        """[B, C] int32, the most likely tokens of the latest step."""
        return self.argmax_history[:, -1]

    def result(self, config: SamplingConfig) -> jax.Array:
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
    """

    cache: KVCache
    keys: jax.Array
    controls: Controls
    last_token: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    limits: jax.Array
    finished: jax.Array
    denoising_steps: jax.Array
    canvases: jax.Array
    causal_passes: jax.Array
    failed_pass: jax.Array
    automaton_states: jax.Array | None

    @classmethod
    def create(
        cls,
        config: SamplingConfig,
        cache: KVCache,
        last_token: jax.Array,
        keys: jax.Array,
        controls: Controls,
    ) -> 'GenerationState':
        """Empty responses behind the cached tokens, the last of which are last_token [B]."""
        zeros = jnp.zeros_like(last_token)
        limits = zeros + config.max_new_tokens
        if controls.max_new_tokens is not None:
            limits = jnp.minimum(limits, controls.max_new_tokens)
        return cls(
            cache=cache,
            keys=keys,
            controls=controls,
            last_token=last_token,
            tokens=jnp.full((zeros.size, config.max_new_tokens), config.pad_id, jnp.int32),
            lengths=zeros,
            limits=limits,
            finished=limits == 0,
            denoising_steps=zeros,
            canvases=zeros,
            causal_passes=zeros,
            failed_pass=zeros,
            automaton_states=controls.start_states(zeros.size),
        )

    def temperature(self, config: SamplingConfig) -> float | jax.Array:
        """The config's number, or one per row [B]."""
        given = self.controls.temperature
        return config.temperature if given is None else given

    def top_p(self, config: SamplingConfig) -> float | jax.Array | None:
        """The config's number, or one per row [B]."""
        return config.top_p if self.controls.top_p is None else self.controls.top_p

    @property
    def running(self) -> jax.Array:
        """[] bool, some row is unfinished."""
        return ~jnp.all(self.finished)

    def finish_unless(self, finite: jax.Array, name: str) -> 'GenerationState':
        """Ends the unfinished rows in which the logits of a pass are not `finite` [B] bool."""
        failed = first_failure(self.failed_pass, name, ~self.finished & ~finite)
        return self.replace(failed_pass=failed, finished=self.finished | (failed > 0))

    def emit(
        self,
        config: SamplingConfig,
        block: jax.Array,
        passes: int | jax.Array,
        counts: jax.Array | None = None,
    ) -> 'GenerationState':
        """Appends a block of tokens to the responses of the unfinished rows.

        A response ends with its first stop token, or at its limit.

        Args:
          config: stop ids.
          block: [B, T] int32.
          passes: [B] int32 or scalar, denoise passes that the block took.
          counts: [B] int32, tokens of the block that count; None for all.
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
        states = self.automaton_states
        if states is not None:
            states = advance(self.controls.automaton, states, block, counts)
        return self.replace(
            automaton_states=states,
            last_token=jnp.where(counts > 0, latest, self.last_token),
            tokens=self.tokens.at[rows, slots].set(block, mode='drop'),
            lengths=lengths,
            finished=self.finished | stopped | (lengths >= self.limits),
            denoising_steps=self.denoising_steps + jnp.where(self.finished, 0, passes),
        )

    def insert(self, new: 'GenerationState', slots: jax.Array) -> 'GenerationState':
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
        rest = {'cache': None, 'controls': None}
        state = jax.tree.map(put, self.replace(**rest), new.replace(**rest))
        return state.replace(cache=cache, controls=controls)

    def output(self) -> SamplerOutput:
        return SamplerOutput(
            tokens=self.tokens,
            lengths=self.lengths,
            denoising_steps=self.denoising_steps,
            canvases=self.canvases,
            causal_passes=self.causal_passes,
            failed_pass=self.failed_pass,
        )
