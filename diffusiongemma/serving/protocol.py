"""Parses request bodies of OpenAI's protocol into arguments of an engine."""

import dataclasses
import json
import secrets
from typing import Any

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.sampler import MODES
from diffusiongemma.serving.fields import Fields, RequestError, name_of
from diffusiongemma.serving.prompts import encode, read_conversation, read_prompt

MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 256
# OpenAI's fields that are only accepted with values without effect, and the reason for an error.
_NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    'n': ((1,), 'send one request per answer, each with a different seed.'),
    'best_of': ((1,), 'send one request per answer, each with a different seed.'),
    'logit_bias': (({},), 'the server has no token biases; the library can ban sets of tokens.'),
    'presence_penalty': ((0, 0.0), 'there is no penalty on repetition.'),
    'frequency_penalty': ((0, 0.0), 'there is no penalty on repetition.'),
    'echo': ((False,), 'put the prompt before the answer yourself.'),
    'tools': (([],), 'tool calls are not supported; use response_format.'),
    'tool_choice': (('none', 'auto'), 'tool calls are not supported; use response_format.'),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits and defaults of requests to a server.

    Attributes:
      max_new_tokens: the maximum number of tokens of an answer.
      canvas_length: the canvas length of the model; 0 if it has no canvas.
      modes: for each decode mode, the reason why the model does not support it, or None.
      default_mode: the mode of requests without one.
      temperature: the temperature of requests without one.
    """

    max_new_tokens: int
    canvas_length: int
    modes: dict[str, str | None]
    default_mode: str
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """A parsed request for generated text.

    Attributes:
      prompt: the token ids of the prompt.
      chat: whether the answer is a message of a conversation.
      mode, temperature, top_p, max_new_tokens, stop: the arguments of `Engine.submit`.
      seed: the seed of the random key.
      stream: whether parts of the answer are sent immediately.
      stream_usage: whether the stream ends with the token counts.
      suffix: the tokens that follow the answer in the same canvas, or None.
      schema: the JSON schema of the answer, or None.
      logprobs: the number of most likely tokens to return per position, in addition to the
        log-probability of the token of the answer; None for no log-probabilities.
      watch: whether every denoise step is sent, in modes with denoise steps.
    """

    prompt: list[int]
    chat: bool
    mode: str
    temperature: float
    top_p: float | None
    max_new_tokens: int | None
    stop: tuple[str, ...]
    seed: int
    stream: bool
    stream_usage: bool
    suffix: list[int] | None = None
    schema: Any = None
    logprobs: int | None = None
    watch: bool = False


def read_completion(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> GenerationTask:
    """Parses a body of /v1/completions; raises RequestError."""
    fields = Fields(body)
    prompt = read_prompt(fields, tokenizer)
    text = fields.text('suffix')
    suffix = encode(fields, 'suffix', text, tokenizer) if text else []
    if body['prompt'] in ('', ['']) and not suffix:
        raise fields.error('prompt', 'prompt is empty; give a text to continue, or a suffix.')
    task = _task(fields, prompt, False, limits)
    fields.end()
    return _with_suffix(task, suffix, limits) if suffix else task


def read_chat(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> GenerationTask:
    """Parses a body of /v1/chat/completions; raises RequestError."""
    fields = Fields(body)
    prompt = read_conversation(fields, tokenizer)
    task = _task(fields, prompt, True, limits)
    fields.end()
    return task


@dataclasses.dataclass(frozen=True)
class Decision:
    """A parsed request for the probabilities of answers, see `sampling.decide.decide`.

    Attributes:
      prompt: the token ids of the prompt.
      texts: the texts of the answers.
      answers: the token ids of the answers.
      before, after: the token ids before and after the answer.
      draws: the number of passes that are averaged.
      seed: the seed of the random key.
    """

    prompt: list[int]
    texts: list[str]
    answers: list[list[int]]
    before: list[int]
    after: list[int]
    draws: int
    seed: int


def read_decision(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> Decision:
    """Parses a body of /v1/decisions; raises RequestError."""
    del limits
    fields = Fields(body)
    fields.any('model')
    chat = fields.has('messages')
    prompt = read_conversation(fields, tokenizer) if chat else read_prompt(fields, tokenizer)
    texts = fields.array('answers') or []
    if not 1 <= len(texts) <= 64 or not all(isinstance(t, str) and t for t in texts):
        raise fields.error('answers', 'answers must be 1 to 64 texts, none of them empty.')
    if len(set(texts)) < len(texts):
        raise fields.error('answers', 'answers must differ from each other.')
    after = fields.text('after')
    decision = Decision(
        prompt=prompt,
        texts=texts,
        answers=[encode(fields, 'answers', text, tokenizer) for text in texts],
        before=encode(fields, 'before', fields.text('before') or '', tokenizer),
        after=[tokenizer.stop_ids[-1]] if after is None
        else encode(fields, 'after', after, tokenizer),
        draws=fields.integer('draws', 1, 64) or 1,
        seed=_seed(fields),
    )  # fmt: skip
    fields.end()
    return decision


def read_frames(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> GenerationTask:
    """Parses a body of /v1/frames; raises RequestError."""
    fields = Fields(body)
    chat = fields.has('messages')
    prompt = read_conversation(fields, tokenizer) if chat else read_prompt(fields, tokenizer)
    task = GenerationTask(
        prompt=prompt, chat=chat, mode=_mode(fields, limits),
        temperature=_temperature(fields, limits), top_p=None,
        max_new_tokens=fields.integer('max_tokens', 1, limits.max_new_tokens), stop=(),
        seed=_seed(fields), stream=True, stream_usage=False, watch=True,
    )  # fmt: skip
    fields.any('model')
    fields.end()
    return task


def _task(fields: Fields, prompt: list[int], chat: bool, limits: Limits) -> GenerationTask:
    for name, (allowed, reason) in _NEUTRAL.items():
        fields.only(name, allowed, reason)
    for name in ('user', 'model'):
        fields.text(name)
    longest = fields.integer('max_tokens', 1, limits.max_new_tokens)
    if chat:  # OpenAI's newer name for max_tokens
        newer = fields.integer('max_completion_tokens', 1, limits.max_new_tokens)
        longest = longest if newer is None else newer
    stream = fields.flag('stream')
    options = fields.object('stream_options')
    stream_usage = False
    if options is not None:
        if not stream:
            raise fields.error('stream_options', 'stream_options needs stream=true.')
        stream_usage = options.flag('include_usage')
        options.end()
    mode = _mode(fields, limits)
    return GenerationTask(
        prompt=prompt,
        chat=chat,
        mode=mode,
        temperature=_temperature(fields, limits),
        top_p=fields.number('top_p', 0, 1, above=True),
        max_new_tokens=longest,
        stop=_stops(fields),
        seed=_seed(fields),
        stream=stream,
        stream_usage=stream_usage,
        schema=_schema(fields),
        logprobs=_logprobs(fields, chat, mode),
    )


def _logprobs(fields: Fields, chat: bool, mode: str) -> int | None:
    """Returns the number of most likely tokens to report, or None for no log-probabilities."""
    if chat:
        has_logprobs = fields.flag('logprobs')
        count = fields.integer('top_logprobs', 0, MAX_TOP_LOGPROBS)
        if count and not has_logprobs:
            raise fields.error('top_logprobs', 'top_logprobs needs logprobs=true.')
        count = (count or 0) if has_logprobs else None
    else:
        count = fields.integer('logprobs', 0, MAX_TOP_LOGPROBS)
    if count is not None and mode == 'diffusion':
        raise fields.error(
            'logprobs',
            "logprobs come from a causal pass over the answer, which mode 'diffusion' does not "
            "run: use mode 'lossless' or 'autoregressive'.",
        )
    return count


def _temperature(fields: Fields, limits: Limits) -> float:
    temperature = fields.number('temperature', 0, 100)
    return limits.temperature if temperature is None else temperature


def _seed(fields: Fields) -> int:
    seed = fields.integer('seed', 0, MAX_SEED)
    return secrets.randbits(31) if seed is None else seed


def _mode(fields: Fields, limits: Limits) -> str:
    mode = fields.text('mode')
    if mode is None:
        return limits.default_mode
    if mode not in MODES:
        raise fields.error('mode', f'mode must be one of {sorted(MODES)}, got {mode[:40]!r}.')
    reason = limits.modes[mode]
    if reason is not None:
        raise fields.error('mode', f'mode {mode!r} is not available: {reason}')
    return mode


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.any('stop')
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    fits = isinstance(stops, list) and len(stops) <= _MAX_STOPS
    if not fits or not all(isinstance(s, str) and 0 < len(s) <= _MAX_STOP_LENGTH for s in stops):
        raise fields.error(
            'stop',
            f'stop must be a text or at most {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_LENGTH} '
            'characters.',
        )
    return tuple(stops)


def _schema(fields: Fields) -> Any:
    spec = fields.object('response_format')
    if spec is None:
        return None
    kind = spec.text('type')
    if kind == 'json_schema':
        inner = spec.object('json_schema')
        if inner is None or not inner.has('schema'):
            raise spec.error('json_schema', 'response_format.json_schema.schema is missing.')
        schema = inner.any('schema')
        if not isinstance(schema, (dict, bool)):
            raise inner.error(
                'schema',
                f'response_format.json_schema.schema must be an object, got {name_of(schema)}.',
            )
        for name in ('name', 'description', 'strict'):
            inner.any(name)
        inner.end()
    elif kind == 'json_object':
        schema = {'type': 'object'}
    elif kind == 'text':
        schema = None
    else:
        raise spec.error(
            'type',
            "response_format.type must be 'text', 'json_object' or 'json_schema', got "
            f'{json.dumps(kind)[:40]}.',
        )
    spec.end()
    return schema


def _with_suffix(task: GenerationTask, suffix: list[int], limits: Limits) -> GenerationTask:
    """Returns a fill-in-the-middle task: the answer and the suffix are in one canvas."""
    if task.mode != 'diffusion':
        raise RequestError(
            400,
            "suffix needs mode='diffusion', where the answer can attend to the suffix; got "
            f'{task.mode!r}.',
            'suffix',
        )
    for name, value in (('stop', task.stop), ('response_format', task.schema)):
        if value:
            raise RequestError(
                400, f'suffix cannot be combined with {name}; leave one out.', 'suffix'
            )
    room = min(limits.canvas_length, limits.max_new_tokens) - len(suffix)
    gap = room if task.max_new_tokens is None else task.max_new_tokens
    if not 1 <= gap <= room:
        raise RequestError(
            400,
            f'suffix has {len(suffix)} tokens, and the canvas has {limits.canvas_length} for the '
            f'answer and the suffix: max_tokens must lie in [1, {room}].'
            if room >= 1
            else f'suffix has {len(suffix)} tokens, but it and the answer must fit into '
            f'{min(limits.canvas_length, limits.max_new_tokens)} tokens; shorten it.',
            'suffix',
        )
    return dataclasses.replace(task, suffix=suffix, max_new_tokens=gap)
