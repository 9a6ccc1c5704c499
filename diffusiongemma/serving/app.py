"""The HTTP routes of a server: reads request bodies and sends JSON or server-sent events."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.events import End, Event, Failed
from diffusiongemma.serving.answers import Form, event
from diffusiongemma.serving.fields import RequestError, parse_object
from diffusiongemma.serving.page import page
from diffusiongemma.serving.protocol import (
    GenerationTask,
    Limits,
    read_chat,
    read_completion,
    read_decision,
    read_frames,
)
from diffusiongemma.serving.service import Call, Service, failure
from diffusiongemma.view.frames import EventFrames, css

_DISCONNECTED = 499  # the client has disconnected; the status only appears in metrics
_T = TypeVar('_T')


def make_app(service: Service) -> Starlette:
    """Returns the ASGI application of a service."""
    endpoints = _Endpoints(service)
    guarded = endpoints.guarded
    routes = [
        Route('/', lambda request: HTMLResponse(page(service.settings.name, service.limits))),
        Route('/health', guarded(endpoints.health, needs_key=False)),
        Route('/metrics', guarded(endpoints.metrics)),
        Route('/v1/models', guarded(endpoints.models)),
        Route('/v1/models/{name:path}', guarded(endpoints.model)),
        Route('/v1/completions', guarded(endpoints.completions), methods=['POST']),
        Route('/v1/chat/completions', guarded(endpoints.chat), methods=['POST']),
        Route('/v1/decisions', guarded(endpoints.decisions), methods=['POST']),
        Route('/v1/frames', guarded(endpoints.frames), methods=['POST']),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


async def _http_error(request: Request, error: Exception) -> Response:
    """Returns the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f'{request.method} {request.url.path[:100]}: {error.detail}.'
    body = RequestError(error.status_code, message).body()
    return JSONResponse(body, error.status_code, headers=error.headers)


class _Endpoints:
    """The request handlers, one method per route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    def guarded(
        self, endpoint: Callable[[Request], Awaitable[Response]], needs_key: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        """Returns a handler that checks the API key, formats errors and counts responses."""
        name = endpoint.__name__

        async def handle(request: Request) -> Response:
            try:
                if needs_key:
                    kind, _, key = request.headers.get('authorization', '').partition(' ')
                    self._service.admit(key.strip() if kind.lower() == 'bearer' else None)
                response = await endpoint(request)
            except RequestError as error:
                response = JSONResponse(error.body(), error.status, _headers(error.status))
            except ClientDisconnect:
                response = Response(status_code=_DISCONNECTED)
            self._service.metrics.request(name, response.status_code)
            return response

        return handle

    async def health(self, request: Request) -> Response:
        draining = self._service.draining
        state = 'shutting down' if draining else 'ok'
        return JSONResponse({'status': state}, 503 if draining else 200)

    async def metrics(self, request: Request) -> Response:
        text = self._service.metrics.text(self._service.gauges())
        return PlainTextResponse(text, media_type='text/plain; version=0.0.4')

    async def models(self, request: Request) -> Response:
        return JSONResponse({'object': 'list', 'data': [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params['name'])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, await self._read(request, read_completion))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, await self._read(request, read_chat))

    async def decisions(self, request: Request) -> Response:
        service = self._service
        decision = await self._read(request, read_decision)
        service.check_room()
        service.open_calls += 1
        try:
            work = service.worker.call(lambda: service.decide(decision))
            probabilities = await asyncio.wrap_future(work)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        finally:
            service.open_calls -= 1
        answers = [
            {'text': text, 'probability': probability}
            for text, probability in zip(decision.texts, probabilities, strict=True)
        ]
        return JSONResponse(
            {
                'object': 'decision', 'model': service.settings.name, 'answers': answers,
                'seed': decision.seed,
            }
        )  # fmt: skip

    async def frames(self, request: Request) -> Response:
        task = await self._read(request, read_frames)
        frames = functools.partial(_frame_events, self._service.frames())
        return await self._stream(self._service.open(task, None), frames)

    async def _read(
        self, request: Request, read: Callable[[dict[str, Any], Tokenizer, Limits], _T]
    ) -> _T:
        """Parses the body of a request, in a thread because long texts are slow to tokenize."""
        body = await self._body(request)
        service = self._service
        return await anyio.to_thread.run_sync(read, body, service.tokenizer, service.limits)

    async def _body(self, request: Request) -> dict[str, Any]:
        """Returns the JSON object of a body, after a check of its type, size and `model`."""
        kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
        if kind != 'application/json':
            raise RequestError(
                415, f"The body must be JSON: send 'Content-Type: application/json', not {kind!r}."
            )
        settings = self._service.settings
        body, limit = bytearray(), settings.max_body_bytes
        declared = request.headers.get('content-length', '')
        try:
            with anyio.fail_after(settings.body_seconds):
                if declared.isdecimal() and int(declared) > limit:
                    raise _too_long(limit)
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise _too_long(limit)
        except TimeoutError:
            raise RequestError(
                408, f'The body did not arrive within {settings.body_seconds:g} seconds.'
            ) from None
        values = parse_object(bytes(body))
        if isinstance(values.get('model'), str):
            self._check_model(values['model'])
        return values

    def _check_model(self, name: str) -> None:
        served = self._service.settings.name
        if name != served:
            raise RequestError(
                404, f'There is no model {name[:80]!r} here, only {served!r}.', 'model',
                'model_not_found',
            )  # fmt: skip

    def _model(self) -> dict[str, Any]:
        limits = self._service.limits
        return {
            'id': self._service.settings.name,
            'object': 'model',
            'created': self._created,
            'owned_by': 'diffusiongemma',
            'modes': [mode for mode, reason in limits.modes.items() if reason is None],
            'max_tokens': limits.max_new_tokens,
            'max_context': self._service.capacity,
        }

    async def _answer(self, request: Request, task: GenerationTask) -> Response:
        service = self._service
        service.check_room()  # before a schema is compiled
        automaton = None
        if task.schema is not None:
            automaton = await anyio.to_thread.run_sync(service.automaton, task.schema)
        form = Form(service, task)
        call = service.open(task, automaton)
        if task.stream:
            return await self._stream(call, form.events)
        try:
            result = await _unless_disconnected(request, call.result())
        finally:
            call.close()
        if result is None:
            return Response(status_code=_DISCONNECTED)
        return JSONResponse(form.whole(result))

    async def _stream(
        self, call: Call, events: Callable[[Call, Event], AsyncIterator[str]]
    ) -> Response:
        """Returns a stream of events, or raises RequestError if the engine rejects the request."""
        try:
            first = await call.next()
        except BaseException:
            call.close()
            raise
        return _EventStream(call, events(call, first))


async def _frame_events(frames: EventFrames, call: Call, first: Event) -> AsyncIterator[str]:
    """Yields the server-sent events of all frames; `first` is the first event of the engine."""
    latest = first
    while True:
        for frame in frames.of(latest):
            cells = [[cell.text, cell.state, css(cell.color)] for cell in frame.cells]
            yield event({'cells': cells, 'caption': frame.caption, 'rate': frame.rate})
        if isinstance(latest, End):
            break
        latest = await call.next()
    if isinstance(latest, Failed):
        yield event(failure(latest).body())
    yield 'data: [DONE]\n\n'


def _too_long(limit: int) -> RequestError:
    return RequestError(413, f'The body is longer than {limit} bytes; send a shorter prompt.')


def _headers(status: int) -> dict[str, str]:
    headers = {'retry-after': '1'} if status in (429, 503) else {}
    # A connection with unread body bytes, or to a server that shuts down, cannot be reused.
    return headers | ({'connection': 'close'} if status in (408, 413, 415, 503) else {})


async def _unless_disconnected(request: Request, work: Awaitable[_T]) -> _T | None:
    """Returns the result of `work`, or None if the client disconnects first."""
    result: _T | None = None
    error: Exception | None = None
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            await _until_disconnect(request.receive)
            group.cancel_scope.cancel()

        group.start_soon(listen)
        try:
            result = await work
        except Exception as exception:  # raised after the group, which would wrap it
            error = exception
        group.cancel_scope.cancel()
    if error is not None:
        raise error
    return result


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())['type'] != 'http.disconnect':
        pass


class _EventStream(Response):
    """A response that sends events immediately and closes their call, even if the client leaves."""

    media_type = 'text/event-stream'

    def __init__(self, call: Call, events: AsyncIterator[str]) -> None:
        super().__init__(headers={'cache-control': 'no-store', 'x-accel-buffering': 'no'})
        del self.headers['content-length']
        self._call, self._events = call, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:

                async def listen() -> None:
                    await _until_disconnect(receive)
                    group.cancel_scope.cancel()

                group.start_soon(listen)
                await self._send(send)
                group.cancel_scope.cancel()
        finally:
            self._call.close()

    async def _send(self, send: Send) -> None:
        start = {'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers}
        await send(start)
        async for text in self._events:
            body = {'type': 'http.response.body', 'body': text.encode(), 'more_body': True}
            await send(body)
        await send({'type': 'http.response.body', 'body': b'', 'more_body': False})
