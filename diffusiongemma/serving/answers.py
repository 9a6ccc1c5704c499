"""Formats responses in OpenAI's protocol: JSON bodies, server-sent events, log-probabilities."""

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
from diffusiongemma.serving.protocol import GenerationTask
from diffusiongemma.serving.service import Call, Service, failure


class Form:
    """A formatter of the answer to one request in OpenAI's protocol."""

    def __init__(self, service: Service, task: GenerationTask) -> None:
        self._task, self._tokenizer = task, service.tokenizer
        self._head = {
            'id': f'{"chatcmpl" if task.chat else "cmpl"}-{uuid.uuid4().hex}',
            'object': 'chat.completion' if task.chat else 'text_completion',
            'created': int(time.time()),
            'model': service.settings.name,
        }

    def whole(self, result: Result) -> dict[str, Any]:
        """Returns the body of a response that is not streamed."""
        text = self._text(result)
        content = {'message': {'role': 'assistant', 'content': text}} if self._task.chat else {
            'text': text
        }  # fmt: skip
        logprobs = None
        if self._task.logprobs is not None:
            scores = _Scores(self._tokenizer, self._task)
            scores.push(result.tokens, result.scores)
            logprobs = scores.until(len(text))
        reason = self._reason(result)
        choice = {'index': 0, **content, 'finish_reason': reason, 'logprobs': logprobs}
        return self._head | {'choices': [choice]} | self._costs(result)

    async def events(self, call: Call, first: Event) -> AsyncIterator[str]:
        """Yields the server-sent events of a streamed response.

        Args:
          call: the call, which returns the further events of the engine.
          first: the first event of the engine.
        """
        if self._task.chat:
            yield self._part({'role': 'assistant', 'content': ''}, None)
        scores, length, latest = _Scores(self._tokenizer, self._task), 0, first
        while isinstance(latest, Delta):
            scores.push(latest.tokens, latest.scores)
            if latest.text and self._task.suffix is None:
                length += len(latest.text)
                yield self._part(latest.text, None, logprobs=scores.until(length))
            latest = await call.next()
        if not isinstance(latest, Finished):
            yield event(failure(latest).body())
            return
        result = latest.result
        if self._task.suffix is not None:
            yield self._part(self._text(result), None)
        yield self._part('', self._reason(result), self._costs(result))
        if self._task.stream_usage:
            yield event(self._part_head() | {'choices': []} | self._costs(result))
        yield 'data: [DONE]\n\n'

    def _part(
        self,
        content: str | dict[str, str],
        reason: str | None,
        costs: dict[str, Any] | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> str:
        choice: dict[str, Any] = {'index': 0, 'finish_reason': reason, 'logprobs': logprobs}
        if not self._task.chat:
            choice['text'] = content
        elif isinstance(content, dict):
            choice['delta'] = content
        else:
            choice['delta'] = {'content': content} if content else {}
        extra = {} if costs is None else {'diffusiongemma': costs['diffusiongemma']}
        return event(self._part_head() | {'choices': [choice]} | extra)

    def _part_head(self) -> dict[str, Any]:
        return self._head | ({'object': 'chat.completion.chunk'} if self._task.chat else {})

    def _text(self, result: Result) -> str:
        if self._task.suffix is None:
            return result.text
        return self._tokenizer.decode(result.tokens[: self._task.max_new_tokens])

    def _reason(self, result: Result) -> str:
        return result.reason if self._task.suffix is None else 'stop'

    def _costs(self, result: Result) -> dict[str, Any]:
        prompt, answer = len(self._task.prompt), len(result.tokens)
        if self._task.suffix is not None:
            answer = self._task.max_new_tokens or 0
        accepted = result.accepted_lengths
        costs: dict[str, Any] = {
            'mode': result.mode,
            'seed': self._task.seed,
            'denoise_passes': result.denoise_passes,
            'causal_passes': result.encode_passes,
            'tokens_per_pass': round(result.tokens_per_pass, 3),
        }
        if accepted is not None and accepted.sum():
            mean = float((accepted * range(len(accepted))).sum() / accepted.sum())
            costs['accepted_length'] = round(mean, 3)
        usage = {
            'prompt_tokens': prompt, 'completion_tokens': answer, 'total_tokens': prompt + answer,
        }  # fmt: skip
        return {'usage': usage, 'diffusiongemma': costs}


class _TokenScore(NamedTuple):
    """A token of an answer with its log-probability under the causal pass.

    Attributes:
      offset: the number of characters of the answer before the token.
      token: the token id.
      logprob: the log-probability of the token in nats.
      top: the most likely tokens at this position with their log-probabilities.
    """

    offset: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class _Scores:
    """A buffer for the log-probabilities of answer tokens that arrive in parts."""

    def __init__(self, tokenizer: Tokenizer, task: GenerationTask) -> None:
        self._tokenizer, self._task = tokenizer, task
        self._in_answer = AnswerTokens(tokenizer)
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._offset = 0
        self._waiting: list[_TokenScore] = []

    def push(self, tokens: list[int], scores: TokenScores | None) -> None:
        """Adds tokens, except for special tokens and thoughts, which are not answer text."""
        if scores is None:
            return
        for place, token in enumerate(tokens):
            if not self._in_answer(token):
                continue
            ids, numbers = scores.top_tokens[place].tolist(), scores.top[place].tolist()
            top = tuple(zip(ids, numbers, strict=True))[: self._task.logprobs]
            logprob = float(scores.chosen[place])
            self._waiting.append(_TokenScore(self._offset, token, logprob, top))
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def until(self, length: int) -> dict[str, Any] | None:
        """Removes and returns the scores of tokens that start in the first `length` characters.

        Returns:
          The value of the field `logprobs`; None if the request has no `logprobs`.
        """
        if self._task.logprobs is None:
            return None
        scores = [score for score in self._waiting if score.offset < length]
        self._waiting = self._waiting[len(scores) :]
        if self._task.chat:
            return {'content': [self._entry(score) for score in scores], 'refusal': None}
        return {
            'tokens': [self._text(score.token) for score in scores],
            'token_logprobs': [score.logprob for score in scores],
            'top_logprobs': [
                {self._text(token): logprob for token, logprob in score.top} for score in scores
            ]
            if self._task.logprobs
            else None,
            'text_offset': [score.offset for score in scores],
        }

    def _entry(self, score: _TokenScore) -> dict[str, Any]:
        top = [self._token_entry(token, logprob) for token, logprob in score.top]
        return self._token_entry(score.token, score.logprob) | {'top_logprobs': top}

    def _token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        parts = list(self._tokenizer.token_bytes(token)) or None
        return {'token': self._text(token), 'logprob': logprob, 'bytes': parts}

    def _text(self, token: int) -> str:
        """Returns the text of a token, or its piece in the vocabulary if it has no text."""
        text = self._tokenizer.token_bytes(token).decode('utf-8', 'replace')
        return text or self._tokenizer.piece(token)


def event(value: dict[str, Any]) -> str:
    """Returns a server-sent event with a JSON value."""
    return f'data: {json.dumps(value)}\n\n'
