"""Text in, text out: tokenizes prompts, samples, and decodes responses."""

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
      sampler: a sampler with a config from `SamplingConfig.for_tokenizer(tokenizer)`.
      params: the parameters of the model.
      tokenizer: the tokenizer of the model.
      prompts: one user turn each; they form one batch.
      rng: one key, or one per prompt.
      system: the system text of all prompts.
      multiple: prompts are padded to a multiple of this length.
      controls: settings and constraints of the rows.

    Returns:
      The answers, without thoughts and turn end, and the sampler's output.

    Raises:
      ValueError: if the sampler does not stop at the tokenizer's end of turn, if there are no
        prompts, or if `prompts` is a text.
    """
    check_stops(sampler, tokenizer)
    if isinstance(prompts, str):
        raise ValueError('prompts must be a list of texts, got one text; write [prompt].')
    formatted = [tokenizer.format_prompt(prompt, system) for prompt in prompts]
    tokens, lengths = pad_prompts(formatted, tokenizer.pad_id, multiple=multiple)
    output = sampler(params, tokens, lengths, rng=rng, controls=controls)
    return decode_responses(tokenizer, output), output


def check_stops(sampler: Sampler, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the sampler does not stop at the tokenizer's end of turn."""
    missing = sorted(set(tokenizer.stop_ids) - set(sampler.config.stop_ids))
    if missing:
        raise ValueError(
            f'stop_ids={sampler.config.stop_ids} of the sampling config lack {missing}, with '
            'which this tokenizer ends a turn. Create the config with SamplingConfig.for_tokenizer.'
        )


def decode_responses(tokenizer: Tokenizer, output: SamplerOutput) -> list[str]:
    """Returns the text of the answer of each row.

    Tokens in a thought channel, even in one that is never closed, are not part of the answer;
    `ChatSampler` and `Tokenizer.split_thoughts` return them. Special tokens, including the stop
    token, are skipped.
    """
    rows, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    return [
        tokenizer.decode(tokenizer.split_thoughts(row[:length].tolist())[1])
        for row, length in zip(rows, lengths, strict=True)
    ]


class AnswerTokens:
    """A classifier of response tokens, in order, that returns whether a token is answer text.

    Special tokens and thoughts are not.
    """

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
    """An incremental decoder for the text of a response that is streamed token by token.

    Together, the parts that `push` and `finish` return equal the text of `decode_responses` for
    all tokens, cut at the first stop text. No part ends inside a character or inside a possible
    stop text.

    Attributes:
      stopped: whether a stop text has occurred; no more text is returned then.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Starts before the first token.

        Args:
          tokenizer: the tokenizer of the model.
          stop: stop texts; the first one that occurs ends the response and is not part of it.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []  # ids of the answer, without thoughts
        self._in_answer = AnswerTokens(tokenizer)
        # The text of ids[:_read] is already returned. Decoding restarts at ids[_context], because
        # the text of a token can depend on the token before it.
        self._context, self._read = 0, 0
        self._held = ''
        self.stopped = False

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the additional text that is final after these tokens."""
        self._ids += filter(self._in_answer, tokens)
        return self._until_stop(self._decoded(len(self._ids) - self._open_bytes()))

    def finish(self) -> str:
        """Returns the remaining text when no more tokens follow."""
        text = self._until_stop(self._decoded(len(self._ids))) + self._held
        self._held = ''
        return text

    def _open_bytes(self) -> int:
        """Returns how many of the last tokens are bytes of an incomplete character."""
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
        """Returns the text of ids[_read:end] and marks it as read."""
        if end <= self._read:
            return ''
        before = self._tokenizer.decode(self._ids[self._context : self._read])
        text = self._tokenizer.decode(self._ids[self._context : end])[len(before) :]
        self._context, self._read = self._read, end
        return text

    def _until_stop(self, text: str) -> str:
        """Returns the text up to a stop text, and holds back the possible start of one."""
        if self.stopped:
            return ''
        text = self._held + text
        self._held = ''
        starts = [start for start in map(text.find, self._stop) if start >= 0]
        if starts:
            self.stopped = True
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
