"""The sampling settings: `SamplingConfig`."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from diffusiongemma.sampling.acceptance import AcceptanceRule, Ancestral, EntropyBound
from diffusiongemma.sampling.drafts import MAX_NGRAM, DraftSource
from diffusiongemma.sampling.rules import RULES, check_rule, read_rule
from diffusiongemma.sampling.schedule import TemperatureSchedule
from diffusiongemma.sampling.stopping import Never, StableAndConfident, StoppingRule

_WHOLE_NUMBERS = (
    'max_new_tokens',
    'max_denoising_steps',
    'max_draft_steps',
    'lookup_ngram',
    'top_k',
    'pad_id',
    'vocab_size',
    'prefill_chunk',
    'logprobs',
)


def _is_custom(rule: AcceptanceRule | None) -> bool:
    """Returns whether a rule is a user's dataclass."""
    shipped = type(rule).__module__.startswith('diffusiongemma.')
    return dataclasses.is_dataclass(rule) and not shipped


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The sampling settings, frozen and hashable; the defaults are those of the released models.

    Attributes:
      max_new_tokens: the maximum length of a response; it need not be a multiple of the canvas
        length.
      max_denoising_steps: T, the maximum number of denoise steps per canvas.
      drafts: a source of drafts for the lossless mode, such as `PromptLookup`, or its text, such
        as 'PromptLookup(length=8)'; None for the model's denoiser.
      lookup_ngram: in the lossless mode, if the last tokens (at least this many) also occur
        earlier in the text, the draft copies what followed them there; otherwise the model
        drafts. 0 disables lookups. Code and other repetitive text is faster with lookups.
      draft_length: the number of canvas tokens of a draft in the lossless mode, at most the canvas
        length of the model; None for the canvas length. Short drafts are verified faster.
      model_draft_length: the length of the model's drafts if lookups are enabled. Lookup drafts
        are longer (`draft_length`), because a copied text often continues for many tokens. It only
        has an effect with one row, whose verify pass is as wide as its draft; None for
        `draft_length`.
      max_draft_steps: the maximum number of denoise steps per draft in the lossless mode. A row
        takes one more step after a draft that was rejected early, and one less after a draft that
        was fully accepted.
      entropy_bound: the bound of the `EntropyBound` rule in nats; None for 0.1. It cannot be
        combined with another `acceptance`.
      t_min: the temperature that the schedule approaches at the last denoise step.
      t_max: the temperature of the first denoise step.
      temperature_exponent: the shape of the schedule between them, see `TemperatureSchedule`.
      stability_threshold: the number of previous steps that must agree, see `StableAndConfident`;
        None for 1. It cannot be combined with `stopping`.
      confidence_threshold: the mean entropy in nats, see `StableAndConfident`; None for 0.005. It
        cannot be combined with `stopping`.
      temperature: a factor on the temperatures of the schedule, and the softmax temperature of the
        autoregressive mode. 0 is greedy: candidates are the argmax tokens, while entropies are
        still those of the schedule's distribution.
      top_k: candidates, and tokens of the autoregressive mode, are drawn from the k most likely
        tokens; None for all. Entropies and confidences are those of the whole distribution.
      top_p: the same, with the smallest set of most likely tokens whose total probability is at
        least p.
      stop_ids: tokens that end a response. The default is the <eos> of Gemma's vocabularies;
        a chat model ends its turn with another one, see `for_tokenizer`. () never stops.
      pad_id: the token id of the output after the end of a response.
      vocab_size: noise is uniform over token ids below this number, and no other ids are
        generated; None for the vocabulary size of the model.
      prefill_chunk: the number of prompt tokens that are encoded at a time, for long prompts whose
        attention would not fit in memory; None for all at once.
      commits: 'argmax' commits the argmax canvas of the last step, 'canvas' the canvas that the
        acceptance rule made.
      acceptance: a rule that replaces the entropy bound, or its text, such as 'TopK(k=4)'.
      stopping: a rule that replaces stability and confidence, or its text, such as 'Never()'.
      logprobs: in the autoregressive and lossless modes, the output also has the log-probabilities
        of its tokens, and this many most likely tokens per position with theirs (`TokenScores`);
        None for no log-probabilities.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    drafts: DraftSource | None = None
    lookup_ngram: int = 0
    draft_length: int | None = None
    model_draft_length: int | None = None
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
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, 'stop_ids', tuple(int(i) for i in self.stop_ids))
        self._check_types()
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
                f'vocab_size must be >= 1, got {self.vocab_size}; use None for the vocabulary '
                'size of the model.'
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
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(
                f'logprobs must be >= 0 most likely tokens, got {self.logprobs}; None gives none.'
            )
        if self.commits not in ('argmax', 'canvas'):
            raise ValueError(f"commits must be 'argmax' or 'canvas', got {self.commits!r}.")
        self._check_drafts()
        for name in RULES:
            object.__setattr__(self, name, read_rule(name, getattr(self, name)))
        if isinstance(self.acceptance, Hashable) and _is_custom(self.acceptance):
            check_rule(self.acceptance)
        self._check_one_rule('acceptance', 'entropy_bound')
        self._check_one_rule('stopping', 'stability_threshold')
        self._check_one_rule('stopping', 'confidence_threshold')
        # The constructors of these rules check their numbers.
        _ = self.schedule, self.acceptance_rule, self.stopping_rule

    def _check_types(self) -> None:
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is not None and not whole:
                raise ValueError(f'{name} must be a whole number, got {value!r}.')
        for name in ('temperature', 'top_p', 't_min', 't_max', 'temperature_exponent'):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float, np.number)):
                raise ValueError(f'{name} must be a number, got {value!r}.')

    def _check_drafts(self) -> None:
        if self.max_draft_steps < 1:
            raise ValueError(f'max_draft_steps must be >= 1, got {self.max_draft_steps}.')
        if not 0 <= self.lookup_ngram <= MAX_NGRAM:
            raise ValueError(
                f'lookup_ngram must be 0 to {MAX_NGRAM} tokens, got {self.lookup_ngram}; '
                '0 disables lookups.'
            )
        if self.lookup_ngram and self.drafts is not None:
            raise ValueError(
                'drafts and lookup_ngram are both set: use one of them. With lookup_ngram, the '
                'model drafts if the text has no match.'
            )
        for name, other in (
            ('draft_length', "the model's canvas length"),
            ('model_draft_length', 'draft_length'),
        ):
            length = getattr(self, name)
            if length is not None and (not isinstance(length, int) or length < 2):
                raise ValueError(
                    f'{name} must be a whole number >= 2 of canvas tokens, got {length!r}; None '
                    f'takes {other}.'
                )
        if self.model_draft_length is not None and not self.lookup_ngram:
            raise ValueError(
                f'model_draft_length={self.model_draft_length} needs lookup_ngram > 0; without '
                'lookups, set draft_length instead.'
            )
        if self.draft_length and (self.model_draft_length or 0) > self.draft_length:
            raise ValueError(
                f'model_draft_length={self.model_draft_length} is more than '
                f'draft_length={self.draft_length}.'
            )

    def _check_one_rule(self, rule: str, number: str) -> None:
        """Raises ValueError if a number is set that has no effect because a rule replaces it."""
        replaced, value = getattr(self, rule), getattr(self, number)
        if value is not None and replaced is not None and value != getattr(replaced, number, None):
            raise ValueError(
                f'{number}={value} has no effect beside {rule}={replaced!r}, which replaces it. '
                'Leave one of them out (None).'
            )

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, **fields: Any) -> 'SamplingConfig':
        """Returns a config with the tokenizer's `stop_ids`, `pad_id` and `vocab_size`.

        Args:
          tokenizer: a `diffusiongemma.data.tokenizer.Tokenizer`.
          **fields: other fields, or other values for these three.
        """
        return cls(**(cls.tokenizer_fields(tokenizer) | fields))

    @staticmethod
    def tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
        """Returns the fields that a tokenizer determines."""
        return {
            'stop_ids': tokenizer.stop_ids,
            'pad_id': tokenizer.pad_id,
            'vocab_size': tokenizer.vocab_size,
        }

    @classmethod
    def ancestral(cls, **fields: Any) -> 'SamplingConfig':
        """Returns a config for ancestral sampling: all steps at temperature 1, without argmax."""
        exact: dict[str, Any] = {
            'acceptance': Ancestral(), 'stopping': Never(), 'commits': 'canvas',
            't_min': 1.0, 't_max': 1.0,
        }  # fmt: skip
        return cls(**(exact | fields))

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
        stability, confidence = self.stability_threshold, self.confidence_threshold
        rule = StableAndConfident()
        if stability is not None:
            rule = dataclasses.replace(rule, stability_threshold=stability)
        if confidence is not None:
            rule = dataclasses.replace(rule, confidence_threshold=confidence)
        return rule
