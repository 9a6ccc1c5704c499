"""A conversation over an engine: a turn encodes only what is new."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.engine import Delta, Engine, Failed
from diffusiongemma.sampling.prefixes import ConversationCache
from diffusiongemma.sampling.prompts import check_fits
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.text import check_stops


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said, so far while it is streamed.

    Attributes:
      text: the answer.
      thoughts: what it wrote into its thought channel.
      tokens: all token ids of the response.
      denoising_steps: denoise passes that it took.
      finished: whether it ended with a stop token.
      forgotten: earlier turns of the conversation that the model did not see.
    """

    text: str
    thoughts: str
    tokens: list[int]
    denoising_steps: int
    finished: bool
    forgotten: int = 0


class ChatSampler:
    """Holds one conversation.

        chat = ChatSampler(sampler, params, tokenizer, rng=jax.random.key(0))
        chat.send('Mia has 3 apples and buys 4. How many has she?').text

    Attributes:
      sampler: answers the next turn.
      tokens: ids of the conversation so far, as the next turn will see it.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        tokenizer: Tokenizer,
        *,
        rng: jax.Array,
        system: str | None = None,
        thinking: bool = False,
        capacity: int = 4096,
        multiple: int = 64,
        max_turns: int | None = None,
    ) -> None:
        """Starts an empty conversation.

        Args:
          sampler: made with `SamplingConfig.for_tokenizer(tokenizer)`; `max_new_tokens` limits
            each response. The attribute `sampler` may be replaced between turns.
          params: the model's parameters.
          tokenizer: the model's tokenizer.
          rng: one key; every turn draws from a stream of its own.
          system: system text.
          thinking: asks for thoughts. Later turns do not see them.
          capacity: tokens of the whole conversation; the cache is made for so many. Where it is
            full, the model no longer sees the oldest turns.
          multiple: what a turn encodes is padded to this number times a power of two, so that few
            shapes compile.
          max_turns: turns that the model sees, the new one included; None for all that fit. 1 is
            for a model that was trained on single questions.

        Raises:
          ValueError: when the sampler would not stop at the end of a turn, or thoughts are asked
            for of a tokenizer that has no tokens for them.
        """
        check_stops(sampler, tokenizer)
        if max_turns is not None and max_turns < 1:
            raise ValueError(f'max_turns must be >= 1 turn, got {max_turns}; None takes all.')
        self.sampler, self._params, self._tokenizer, self._rng = sampler, params, tokenizer, rng
        self._system, self._thinking = system, thinking
        self._capacity, self._multiple, self._max_turns = capacity, multiple, max_turns
        self._cache = ConversationCache(
            sampler.model,
            params,
            capacity=min(passes.max_positions(sampler.model) or capacity, capacity),
            unseen=len(tokenizer.response_prefix(thinking)),
            multiple=multiple,
            chunk=sampler.config.prefill_chunk,
        )
        tokenizer.format_prompt('', system, thinking)  # raises if it can't
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.tokens: list[int] = []
        self._history: list[tuple[str, list[int]]] = []  # user texts and ended answers, all seen
        self._turns = 0
        self._cache.forget_but(self.tokens)

    @property
    def cached(self) -> int:
        """How many of `tokens` are in the cache."""
        return self._cache.held(self.tokens)

    def send(self, text: str) -> Reply:
        """Answers a user turn; arguments and errors as of `stream`."""
        *_, reply = self.stream(text)
        return reply

    def stream(self, text: str) -> Iterator[Reply]:
        """Answers a user turn and yields the reply after every canvas (or token).

        A turn that is not read to its end leaves the conversation as it was before it. Oldest
        turns that do not fit beside this one and its longest response are forgotten as a whole.

        Raises:
          ValueError: when this turn alone, with its longest response, exceeds the capacity or the
            model's positions.
        """
        seen = self._history
        if self._max_turns is not None:
            seen = seen[len(seen) - min(len(seen), self._max_turns - 1) :]
        tokens = self._prompt(seen, text)
        while seen and not self._has_room(len(tokens)):
            seen = seen[1:]
            tokens = self._prompt(seen, text)
        self._check_room(tokens)
        return self._respond(seen, text, tokens)

    def _prompt(self, seen: Sequence[tuple[str, list[int]]], text: str) -> list[int]:
        """Token ids of some turns and of a new one, up to where its response starts."""
        unseen = len(self._tokenizer.response_prefix(self._thinking))
        tokens: list[int] = []
        for said, answer in seen:
            tokens += self._turn(said, not tokens)
            tokens = tokens[: len(tokens) - unseen] + answer
        return tokens + self._turn(text, not tokens)

    def _turn(self, text: str, is_first: bool) -> list[int]:
        if is_first:
            return self._tokenizer.format_prompt(text, self._system, self._thinking)
        return self._tokenizer.format_turn(text, self._thinking)

    def _respond(
        self, seen: list[tuple[str, list[int]]], text: str, tokens: list[int]
    ) -> Iterator[Reply]:
        # Of one turn: what lasts is in the conversation's cache.
        engine = Engine(
            self.sampler,
            self._params,
            slots=1,
            capacity=self._cache.capacity,
            multiple=self._multiple,
        )
        rng = jax.random.fold_in(self._rng, self._turns)
        engine.submit(tokens, rng=rng, conversation=self._cache)
        response: list[int] = []
        try:
            for event in engine.run():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Delta):
                    response += event.tokens
                    steps, forgotten = event.denoising_steps, self._turns - len(seen)
                    yield self._reply(list(response), steps, forgotten)
            answer = self._tokenizer.end_turn(response)
            history = tokens[: len(tokens) - len(self._tokenizer.response_prefix(self._thinking))]
            self.tokens, self._history = history + answer, [*seen, (text, answer)]
            self._turns += 1
        finally:
            # Later turns see no thoughts, no untrimmed text, and always the same end of a turn.
            self._cache.forget_but(self.tokens)

    def _has_room(self, length: int) -> bool:
        """Whether a prompt and its longest response fit."""
        return length + self.sampler.config.max_new_tokens <= self._cache.capacity

    def _check_room(self, tokens: list[int]) -> None:
        new = self.sampler.config.max_new_tokens
        check_fits(np.array([len(tokens)]), new, passes.max_positions(self.sampler.model))
        if len(tokens) + new > self._capacity:
            raise ValueError(
                f'The question has {len(tokens)} tokens; with max_new_tokens={new} that is more '
                f'than the capacity of {self._capacity} tokens of this conversation. Shorten the '
                'question, or make the ChatSampler with a larger capacity.'
            )

    def _reply(self, response: list[int], denoising_steps: int, forgotten: int = 0) -> Reply:
        thoughts, answer = self._tokenizer.split_thoughts(response)
        return Reply(
            text=self._tokenizer.decode(answer),
            thoughts=self._tokenizer.decode(thoughts).removeprefix('thought\n'),
            tokens=response,
            denoising_steps=denoising_steps,
            finished=response[-1] in self._tokenizer.stop_ids,
            forgotten=forgotten,
        )
