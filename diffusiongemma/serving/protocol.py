"""From the bodies of OpenAI's protocol to requests of an engine."""

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
# Fields of OpenAI's that are taken where they ask for nothing, and why they are refused elsewhere.
_NEUTRAL: dict[str, tuple[tuple, str]] = {
    'n': ((1,), 'send one request per answer, each with a seed of its own.'),
    'best_of': ((1,), 'send one request per answer, each with a seed of its own.'),
    'logit_bias': (({},), 'only whole sets of tokens can be banned, in the library.'),
    'presence_penalty': ((0, 0.0), 'there is no penalty on repetition.'),
    'frequency_penalty': ((0, 0.0), 'there is no penalty on repetition.'),
    'echo': ((False,), 'put the prompt before the answer yourself.'),
    'tools': (([],), 'the models here call no tools; use response_format.'),
    'tool_choice': (('none', 'auto'), 'the models here call no tools; use response_format.'),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server lets a request ask for.

    Attributes:
      max_new_tokens: most tokens of an answer.
      canvas_length: of the model, 0 without a canvas.
      modes: why a decode mode cannot be had, by its name; None where it can.
      default_mode: the mode of requests that name none.
      temperature: of requests that name none.
    """

    max_new_tokens: int
    canvas_length: int
    modes: dict[str, str | None]
    default_mode: str
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a body asks for.

    Attributes:
      prompt: token ids.
      chat: whether the answer is a message of a conversation.
      mode, temperature, top_p, max_new_tokens, stop, seed: as of `Engine.submit`.
      stream: whether parts of the answer are sent as they come.
      stream_usage: whether the stream ends with the costs.
      suffix: tokens that follow the answer in the same canvas, None without.
      schema: of JSON that the answer must be, None without.
      logprobs: how many of the most likely tokens are told at each place, beside the
        log-probability of the answer's own; None for neither.
      watch: whether every denoise step is shown, in a mode that has some.
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


def read_completion(body: dict, tokenizer: Tokenizer, limits: Limits) -> Ask:
    """A body of /v1/completions; raises RequestError."""
    fields = Fields(body)
    prompt = read_prompt(fields, tokenizer)
    text = fields.text('suffix')
    suffix = encode(fields, 'suffix', text, tokenizer) if text else []
    if body['prompt'] in ('', ['']) and not suffix:
        raise fields.error('prompt', 'prompt is empty; give a text to continue, or a suffix.')
    ask = _ask(fields, prompt, False, limits)
    fields.end()
    return _with_suffix(ask, suffix, limits) if suffix else ask


def read_chat(body: dict, tokenizer: Tokenizer, limits: Limits) -> Ask:
    """A body of /v1/chat/completions; raises RequestError."""
    fields = Fields(body)
    prompt = read_conversation(fields, tokenizer)
    ask = _ask(fields, prompt, True, limits)
    fields.end()
    return ask


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a body of /v1/decisions asks for; see `sampling.decide.decide`."""

    prompt: list[int]
    texts: list[str]
    answers: list[list[int]]
    before: list[int]
    after: list[int]
    draws: int
    seed: int


def read_decision(body: dict, tokenizer: Tokenizer, limits: Limits) -> Decision:
    """A body of /v1/decisions; raises RequestError."""
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


def read_frames(body: dict, tokenizer: Tokenizer, limits: Limits) -> Ask:
    """A body of /v1/frames: a prompt or messages, and how to decode; raises RequestError."""
    fields = Fields(body)
    chat = fields.has('messages')
    prompt = read_conversation(fields, tokenizer) if chat else read_prompt(fields, tokenizer)
    ask = Ask(
        prompt=prompt, chat=chat, mode=_mode(fields, limits),
        temperature=_temperature(fields, limits), top_p=None,
        max_new_tokens=fields.integer('max_tokens', 1, limits.max_new_tokens), stop=(),
        seed=_seed(fields), stream=True, stream_usage=False, watch=True,
    )  # fmt: skip
    fields.any('model')
    fields.end()
    return ask


def _ask(fields: Fields, prompt: list[int], chat: bool, limits: Limits) -> Ask:
    for name, (allowed, reason) in _NEUTRAL.items():
        fields.only(name, allowed, reason)
    for name in ('user', 'model'):
        fields.text(name)
    longest = fields.integer('max_tokens', 1, limits.max_new_tokens)
    if chat:  # the newer name of it
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
    return Ask(
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
    """How many of the most likely tokens are asked for, or None where no log-probabilities are."""
    if chat:
        asked = fields.flag('logprobs')
        count = fields.integer('top_logprobs', 0, MAX_TOP_LOGPROBS)
        if count and not asked:
            raise fields.error('top_logprobs', 'top_logprobs needs logprobs=true.')
        count = (count or 0) if asked else None
    else:
        count = fields.integer('logprobs', 0, MAX_TOP_LOGPROBS)
    if count is not None and mode == 'diffusion':
        raise fields.error(
            'logprobs',
            "logprobs are those of the causal pass, which mode 'diffusion' does not take over the "
            "answer: ask with mode 'lossless' or 'autoregressive'.",
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
        raise fields.error('mode', f'mode {mode!r} cannot be had: {reason}')
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


def _with_suffix(ask: Ask, suffix: list[int], limits: Limits) -> Ask:
    """Fill-in-the-middle: the answer and its suffix lie in one canvas."""
    if ask.mode != 'diffusion':
        raise RequestError(
            400,
            f"suffix needs mode='diffusion', where a canvas sees what follows; got {ask.mode!r}.",
            'suffix',
        )
    for name, value in (('stop', ask.stop), ('response_format', ask.schema)):
        if value:
            raise RequestError(400, f'suffix does not go with {name}; leave one out.', 'suffix')
    room = min(limits.canvas_length, limits.max_new_tokens) - len(suffix)
    gap = room if ask.max_new_tokens is None else ask.max_new_tokens
    if not 1 <= gap <= room:
        raise RequestError(
            400,
            f'suffix has {len(suffix)} tokens, and the canvas {limits.canvas_length} for the '
            f'answer and the suffix: max_tokens must lie in [1, {room}].'
            if room >= 1
            else f'suffix has {len(suffix)} tokens; it must have less than the canvas, '
            f'{min(limits.canvas_length, limits.max_new_tokens)}.',
            'suffix',
        )
    return dataclasses.replace(ask, suffix=suffix, max_new_tokens=gap)
