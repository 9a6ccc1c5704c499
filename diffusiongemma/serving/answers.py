"""Answers as OpenAI's clients read them: bodies, server-sent events, log-probabilities."""

import codecs
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.engine import Delta, Finished, Result
from diffusiongemma.sampling.events import Event
from diffusiongemma.sampling.scores import TokenScores
from diffusiongemma.sampling.text import AnswerTokens
from diffusiongemma.serving.protocol import Ask
from diffusiongemma.serving.service import Call, Service, failure


class Form:
    """The answer to a request as OpenAI's clients read it."""

    def __init__(self, service: Service, ask: Ask) -> None:
        self._ask, self._tokenizer = ask, service.tokenizer
        self._head = {
            'id': f'{"chatcmpl" if ask.chat else "cmpl"}-{uuid.uuid4().hex}',
            'object': 'chat.completion' if ask.chat else 'text_completion',
            'created': int(time.time()),
            'model': service.settings.name,
        }

    def whole(self, result: Result) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = self._text(result)
        content = {'message': {'role': 'assistant', 'content': text}} if self._ask.chat else {
            'text': text
        }  # fmt: skip
        scored = None
        if self._ask.logprobs is not None:
            scores = _Scores(self._tokenizer, self._ask)
            scores.push(result.tokens, result.scores)
            scored = scores.until(len(text))
        choice = {'index': 0, **content, 'finish_reason': self._reason(result), 'logprobs': scored}
        return self._head | {'choices': [choice]} | self._costs(result)

    async def events(self, call: Call, news: Event) -> AsyncIterator[str]:
        """Server-sent events of an answer, from its first news on."""
        if self._ask.chat:
            yield self._part({'role': 'assistant', 'content': ''}, None)
        scores, sent = _Scores(self._tokenizer, self._ask), 0
        while isinstance(news, Delta):
            scores.push(news.tokens, news.scores)
            if news.text and self._ask.suffix is None:
                sent += len(news.text)
                yield self._part(news.text, None, scored=scores.until(sent))
            news = await call.next()
        if not isinstance(news, Finished):
            yield event(failure(news).body())
            return
        if self._ask.suffix is not None:
            yield self._part(self._text(news.result), None)
        yield self._part('', self._reason(news.result), self._costs(news.result))
        if self._ask.stream_usage:
            yield event(self._part_head() | {'choices': []} | self._costs(news.result))
        yield 'data: [DONE]\n\n'

    def _part(
        self,
        content: str | dict[str, str],
        reason: str | None,
        costs: dict[str, Any] | None = None,
        scored: dict[str, Any] | None = None,
    ) -> str:
        choice: dict[str, Any] = {'index': 0, 'finish_reason': reason, 'logprobs': scored}
        if not self._ask.chat:
            choice['text'] = content
        elif isinstance(content, dict):
            choice['delta'] = content
        else:
            choice['delta'] = {'content': content} if content else {}
        extra = {} if costs is None else {'diffusiongemma': costs['diffusiongemma']}
        return event(self._part_head() | {'choices': [choice]} | extra)

    def _part_head(self) -> dict[str, Any]:
        return self._head | ({'object': 'chat.completion.chunk'} if self._ask.chat else {})

    def _text(self, result: Result) -> str:
        if self._ask.suffix is None:
            return result.text
        return self._tokenizer.decode(result.tokens[: self._ask.max_new_tokens])

    def _reason(self, result: Result) -> str:
        return result.reason if self._ask.suffix is None else 'stop'

    def _costs(self, result: Result) -> dict[str, Any]:
        prompt, answer = len(self._ask.prompt), len(result.tokens)
        if self._ask.suffix is not None:
            answer = self._ask.max_new_tokens or 0
        accepted = result.accepted_lengths
        costs: dict[str, Any] = {
            'mode': result.mode,
            'seed': self._ask.seed,
            'denoise_passes': result.denoising_steps,
            'causal_passes': result.causal_passes,
            'tokens_per_pass': round(result.tokens_per_pass, 3),
        }
        if accepted is not None and accepted.sum():
            mean = float((accepted * range(len(accepted))).sum() / accepted.sum())
            costs['accepted_length'] = round(mean, 3)
        usage = {
            'prompt_tokens': prompt, 'completion_tokens': answer, 'total_tokens': prompt + answer,
        }  # fmt: skip
        return {'usage': usage, 'diffusiongemma': costs}


class _Scored(NamedTuple):
    """A token of an answer: where its text starts, and what the causal pass gave to it.

    Attributes:
      offset: characters of the answer before it.
      token: its id.
      logprob: in nats.
      top: the most likely tokens at its place with their log-probabilities.
    """

    offset: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class _Scores:
    """The log-probabilities of an answer's tokens, which come bit by bit."""

    def __init__(self, tokenizer: Tokenizer, ask: Ask) -> None:
        self._tokenizer, self._ask = tokenizer, ask
        self._in_answer = AnswerTokens(tokenizer)
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._offset = 0
        self._waiting: list[_Scored] = []

    def push(self, tokens: list[int], scores: TokenScores | None) -> None:
        """Takes more tokens; those without text in the answer are left out."""
        if scores is None:
            return
        for place, token in enumerate(tokens):
            if not self._in_answer(token):
                continue
            ids, numbers = scores.top_tokens[place].tolist(), scores.top[place].tolist()
            top = tuple(zip(ids, numbers, strict=True))[: self._ask.logprobs]
            logprob = float(scores.chosen[place])
            self._waiting.append(_Scored(self._offset, token, logprob, top))
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def until(self, length: int) -> dict[str, Any] | None:
        """`logprobs` of the tokens not yet told that begin in the first `length` characters."""
        if self._ask.logprobs is None:
            return None
        told = [scored for scored in self._waiting if scored.offset < length]
        self._waiting = self._waiting[len(told) :]
        if self._ask.chat:
            return {'content': [self._entry(scored) for scored in told], 'refusal': None}
        return {
            'tokens': [self._text(scored.token) for scored in told],
            'token_logprobs': [scored.logprob for scored in told],
            'top_logprobs': [
                {self._text(token): logprob for token, logprob in scored.top} for scored in told
            ]
            if self._ask.logprobs
            else None,
            'text_offset': [scored.offset for scored in told],
        }

    def _entry(self, scored: _Scored) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in scored.top]
        return self._named(scored.token, scored.logprob) | {'top_logprobs': top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        parts = list(self._tokenizer.token_bytes(token)) or None
        return {'token': self._text(token), 'logprob': logprob, 'bytes': parts}

    def _text(self, token: int) -> str:
        """The text of a token, or the name of one that stands for none."""
        text = self._tokenizer.token_bytes(token).decode('utf-8', 'replace')
        return text or self._tokenizer.piece(token)


def event(value: dict[str, Any]) -> str:
    """A server-sent event that holds a JSON value."""
    return f'data: {json.dumps(value)}\n\n'
