"""From text to text: tokenize prompts, sample, decode."""

import codecs
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.prompts import pad_prompts
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.state import SamplerOutput


def generate_text(
    sampler: Sampler,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    rng: jax.Array,
    system: str | None = None,
    multiple: int = 64,
    controls: Controls | None = None,
) -> tuple[list[str], SamplerOutput]:
    """Answers each prompt as the model's turn of a conversation.

    A pretrained model (`Tokenizer.chat_turns` is False) continues each prompt as plain text.

    Args:
      sampler: made with `SamplingConfig.for_tokenizer(tokenizer)`.
      params: the model's parameters.
      tokenizer: the model's tokenizer.
      prompts: one user turn each; they form one batch.
      rng: one key, or one per prompt.
      system: system text of all prompts.
      multiple: prompts are padded to a multiple of it.
      controls: settings and constraints of the rows.

    Returns:
      The answers, without thoughts and turn end, and the sampler's output.

    Raises:
      ValueError: when the sampler would not stop at the tokenizer's end of turn, or when
        there are no prompts.
    """
    check_stops(sampler, tokenizer)
    formatted = [tokenizer.format_prompt(prompt, system) for prompt in prompts]
    tokens, lengths = pad_prompts(formatted, tokenizer.pad_id, multiple=multiple)
    output = sampler(params, tokens, lengths, rng=rng, controls=controls)
    return decode_responses(tokenizer, output), output


def check_stops(sampler: Sampler, tokenizer: Tokenizer) -> None:
    """Raises ValueError when the sampler would not stop at the tokenizer's end of turn."""
    missing = sorted(set(tokenizer.stop_ids) - set(sampler.config.stop_ids))
    if missing:
        raise ValueError(
            f'stop_ids={sampler.config.stop_ids} of the sampling config lack {missing}, with '
            'which this tokenizer ends a turn. Make it with SamplingConfig.for_tokenizer.'
        )


def decode_responses(tokenizer: Tokenizer, output: SamplerOutput) -> list[str]:
    """Returns the text of each row's answer.

    What a model writes into its thought channel is not part of it, not even where the channel is
    never closed; `ChatSampler` and `Tokenizer.split_thoughts` give it. Special tokens, the stop
    token among them, are skipped.
    """
    rows, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    return [
        tokenizer.decode(tokenizer.split_thoughts(row[:length].tolist())[1])
        for row, length in zip(rows, lengths, strict=True)
    ]


class AnswerTokens:
    """Says of the tokens of a response, one after the other, whether they are text of the answer:
    neither special tokens nor thoughts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.special_ids
        ids: tuple[int | None, ...] = tokenizer.think_ids or (None, None, None)
        _, self._opens, self._closes = ids
        self._thinking = False

    def __call__(self, token: int) -> bool:
        if token in (self._opens, self._closes):
            self._thinking = token == self._opens
            return False
        return not self._thinking and token not in self._special


class TextStream:
    """The text of a response whose tokens come bit by bit.

    The parts that `push` and `finish` return join to what `decode_responses` gives for all tokens,
    cut where a stop text begins. No part ends inside a character or inside what may become a stop
    text.

    Attributes:
      stopped: whether a stop text has come; nothing follows it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Starts before the first token.

        Args:
          tokenizer: the model's tokenizer.
          stop: texts of which the first to come ends the response; it is not part of it.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []  # of the answer, without thoughts
        self._in_answer = AnswerTokens(tokenizer)
        # The text of ids[:_read] is out of the decoder. Two reads back it starts anew, since what a
        # token adds may depend on the one before it.
        self._context, self._read = 0, 0
        self._held = ''
        self.stopped = False

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the text that is certain now and was not before."""
        self._ids += filter(self._in_answer, tokens)
        return self._until_stop(self._decoded(len(self._ids) - self._open_bytes()))

    def finish(self) -> str:
        """Returns what is left when no token follows."""
        text = self._until_stop(self._decoded(len(self._ids))) + self._held
        self._held = ''
        return text

    def _open_bytes(self) -> int:
        """How many of the last tokens are bytes of a character that is not complete."""
        for count in (3, 2, 1):
            if len(self._ids) - count < self._read:
                continue
            last = b''.join(self._tokenizer.token_bytes(i) for i in self._ids[-count:])
            decoder = codecs.getincrementaldecoder('utf-8')()
            try:
                if last and not decoder.decode(last):
                    return count
            except UnicodeDecodeError:
                pass
        return 0

    def _decoded(self, end: int) -> str:
        """The text of ids[_read:end]."""
        if end <= self._read:
            return ''
        before = self._tokenizer.decode(self._ids[self._context : self._read])
        text = self._tokenizer.decode(self._ids[self._context : end])[len(before) :]
        self._context, self._read = self._read, end
        return text

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ''
        text = self._held + text
        self._held = ''
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text a stop text begins with, not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
