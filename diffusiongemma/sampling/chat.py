"""A multi-turn conversation that reuses its K/V cache: each turn only encodes its new tokens."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling.engine import Delta, Engine, Failed
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.prefixes import ConversationCache
from diffusiongemma.sampling.prompts import check_fits
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.text import check_stops


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer of the model, or its beginning while it is streamed.

    Attributes:
      text: the answer without thoughts.
      thoughts: the text of the thought channel.
      tokens: all token ids of the response.
      denoising_steps: the number of denoise passes.
      finished: whether the response ended with a stop token.
      forgotten: the number of earlier turns of the conversation that the model did not see.
    """

    text: str
    thoughts: str
    tokens: list[int]
    denoising_steps: int
    finished: bool
    forgotten: int = 0


class ChatSampler:
    """A sampler for one conversation, which remembers earlier turns.

        chat = ChatSampler(sampler, params, tokenizer, rng=jax.random.key(0))
        chat.send('Mia has 3 apples and buys 4. How many does she have?').text

    Attributes:
      sampler: the sampler of the next turn.
      max_turns: the maximum number of turns that the model sees; None for all that fit.
      tokens: the token ids of the conversation so far, which precede the next turn.
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
          sampler: a sampler with a config from `SamplingConfig.for_tokenizer(tokenizer)`;
            `max_new_tokens` limits each response. The attribute `sampler` may be replaced between
            turns.
          params: the parameters of the model.
          tokenizer: the tokenizer of the model.
          rng: one key, from which every turn derives an independent key.
          system: the system text.
          thinking: whether the model is asked to write thoughts. Later turns do not see them.
          capacity: the number of tokens of the conversation that the cache has room for. If it is
            full, the model no longer sees the oldest turns.
          multiple: the new tokens of a turn are padded to this length times a power of two, so
            that few shapes are compiled.
          max_turns: the number of turns that the model sees, including the new one; None for all
            that fit. Use 1 for a model that was trained on single questions.

        Raises:
          ValueError: if max_turns < 1, if the sampler does not stop at the tokenizer's end of
            turn, or if `thinking` is True and the tokenizer has no thought tokens.
        """
        check_stops(sampler, tokenizer)
        if max_turns is not None and max_turns < 1:
            raise ValueError(f'max_turns must be >= 1 turn, got {max_turns}; None takes all.')
        self.sampler, self._params, self._tokenizer, self._rng = sampler, params, tokenizer, rng
        self._system, self._thinking = system, thinking
        self._capacity, self._multiple, self.max_turns = capacity, multiple, max_turns
        self._cache = ConversationCache(
            sampler.model,
            params,
            capacity=min(traits(sampler.model).max_positions or capacity, capacity),
            unseen=len(tokenizer.response_prefix(thinking)),
            multiple=multiple,
            chunk=sampler.config.prefill_chunk,
        )
        tokenizer.format_prompt('', system, thinking)  # raises early if this is not supported
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.tokens: list[int] = []
        # The turns that the model still sees: user texts, and answers with their end of turn.
        self._history: list[tuple[str, list[int]]] = []
        self._turns = 0
        self._cache.forget_but(self.tokens)

    @property
    def cached(self) -> int:
        """Returns the number of leading tokens of `tokens` that are in the cache."""
        return self._cache.held(self.tokens)

    def send(self, text: str) -> Reply:
        """Returns the complete answer to a user turn, see `stream`."""
        *_, reply = self.stream(text)
        return reply

    def stream(self, text: str) -> Iterator[Reply]:
        """Answers a user turn and yields the reply after every canvas (or token).

        If the iterator is not consumed to its end, the conversation is not changed. The oldest
        turns are forgotten as a whole if they do not fit together with this turn and a response
        of max_new_tokens.

        Args:
          text: the text of the user.

        Raises:
          ValueError: if the text is empty, or this turn alone, with a response of max_new_tokens,
            exceeds the capacity or the positions of the model.
        """
        if not text.strip():
            raise ValueError('The message is empty; write a text to answer.')
        history = self._history
        if self.max_turns is not None:  # including this turn
            history = history[len(history) - min(len(history), self.max_turns - 1) :]
        tokens = self._prompt(history, text)
        while history and not self._has_room(len(tokens)):
            history = history[1:]
            tokens = self._prompt(history, text)
        self._check_room(tokens)
        return self._respond(history, text, tokens)

    def _prompt(self, history: Sequence[tuple[str, list[int]]], text: str) -> list[int]:
        """Returns the token ids of earlier turns and a new one, up to the start of its response."""
        unseen = len(self._tokenizer.response_prefix(self._thinking))
        tokens: list[int] = []
        for question, answer in history:
            tokens += self._turn(question, not tokens)
            tokens = tokens[: len(tokens) - unseen] + answer
        return tokens + self._turn(text, not tokens)

    def _turn(self, text: str, is_first: bool) -> list[int]:
        if is_first:
            return self._tokenizer.format_prompt(text, self._system, self._thinking)
        return self._tokenizer.format_turn(text, self._thinking)

    def _respond(
        self, history: list[tuple[str, list[int]]], text: str, tokens: list[int]
    ) -> Iterator[Reply]:
        # The engine lives for one turn; only the cache of the conversation is reused.
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
                    steps, forgotten = event.denoising_steps, self._turns - len(history)
                    yield self._reply(list(response), steps, forgotten)
            answer = self._tokenizer.end_turn(response)
            unseen = len(self._tokenizer.response_prefix(self._thinking))
            self.tokens = tokens[: len(tokens) - unseen] + answer
            self._history = [*history, (text, answer)]
            self._turns += 1
        finally:
            # Later turns see the trimmed answer without thoughts, and always the same end of turn.
            self._cache.forget_but(self.tokens)

    def _has_room(self, length: int) -> bool:
        """Returns whether a prompt of this length and a response of max_new_tokens fit."""
        return length + self.sampler.config.max_new_tokens <= self._cache.capacity

    def _check_room(self, tokens: list[int]) -> None:
        new = self.sampler.config.max_new_tokens
        check_fits(np.array([len(tokens)]), new, traits(self.sampler.model).max_positions)
        if len(tokens) + new > self._capacity:
            raise ValueError(
                f'The question has {len(tokens)} tokens; with max_new_tokens={new} that is more '
                f'than the capacity of {self._capacity} tokens of this conversation. Shorten the '
                'question, or create the ChatSampler with a larger capacity.'
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
