"""The state of a server: model, engine worker, limits, API key, metrics and open requests."""

import asyncio
import collections
import dataclasses
import hmac
import json
import queue
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusiongemma.constraints.automaton import TokenAutomaton
from diffusiongemma.constraints.grammar import from_json_schema
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.errors import FIXABLE
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling.controls import OPEN, Controls, ban, pin
from diffusiongemma.sampling.decide import decide
from diffusiongemma.sampling.engine import Delta, Engine, Failed, Finished, Result
from diffusiongemma.sampling.events import End, Event
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.prompts import pad_prompts
from diffusiongemma.sampling.sampler import MODES, Sampler
from diffusiongemma.serving.fields import RequestError
from diffusiongemma.serving.metrics import Metrics
from diffusiongemma.serving.protocol import MAX_TOP_LOGPROBS, Decision, GenerationTask, Limits
from diffusiongemma.serving.worker import Refused, Ticket, Worker, WorkerEvent
from diffusiongemma.view.frames import EventFrames

_MAX_SCHEMAS = 16  # the number of compiled JSON schemas that are kept


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Attributes:
      name: the name of the model in requests and answers.
      max_queue: the maximum number of requests that wait while all slots are in use.
      api_key: the key that clients must send; None accepts all clients.
      max_body_bytes: the maximum length of a request body in bytes.
      body_seconds: the maximum time for a body to arrive, in seconds.
    """

    name: str
    max_queue: int = 64
    api_key: str | None = None
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0


class Service:
    """The model of a server, with its worker thread, limits and metrics.

    Attributes:
      settings: the settings of the server.
      tokenizer: the tokenizer of the model.
      metrics: counters of requests, tokens and passes.
      capacity: the maximum number of tokens of a prompt and its response.
      limits: the limits and defaults of requests.
      worker: the thread that owns the engine.
      draining: whether new requests are rejected because the server shuts down.
      open_calls: the number of unanswered requests.
    """

    def __init__(
        self,
        engine: Engine,
        params: Params,
        tokenizer: Tokenizer,
        settings: Settings,
        temperature: float = 0.0,
    ) -> None:
        """Starts the thread of the engine.

        Args:
          engine: an engine that was created with this tokenizer.
          params: the parameters of the model.
          tokenizer: the tokenizer of the model.
          settings: the settings of the server.
          temperature: the temperature of requests without one.
        """
        self.settings, self.tokenizer, self.metrics = settings, tokenizer, Metrics()
        self._params, self._sampler, self.capacity = params, engine.sampler, engine.capacity
        self.limits = Limits(
            max_new_tokens=engine.sampler.config.max_new_tokens,
            canvas_length=traits(engine.sampler.model).canvas_length,
            modes={mode: _refusal(engine.sampler, mode) for mode in MODES},
            default_mode=engine.sampler.mode,
            temperature=temperature,
        )
        self.draining, self.open_calls = False, 0
        self._max_open = engine.slots + settings.max_queue
        self._no_stops = np.asarray(ban(engine.sampler.config.stop_ids, self._vocab_size))[None]
        self._schemas: collections.OrderedDict[str, TokenAutomaton] = collections.OrderedDict()
        self._compiling = threading.Lock()
        self.worker = Worker(engine)
        self.worker.start()

    @property
    def _vocab_size(self) -> int:
        size: int = self._sampler.model.config.vocab_size
        return size

    def admit(self, key: str | None) -> None:
        """Raises RequestError if the API key is wrong or the server shuts down."""
        secret = self.settings.api_key
        if secret is not None and not hmac.compare_digest((key or '').encode(), secret.encode()):
            raise RequestError(
                401, "The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                code='invalid_api_key',
            )  # fmt: skip
        if self.draining:
            raise RequestError(503, 'The server is shutting down; ask another one.')

    def check_room(self) -> None:
        """Raises RequestError if too many requests are open."""
        if self.open_calls >= self._max_open:
            raise RequestError(
                429,
                f'{self.open_calls} requests are open, and at most {self.settings.max_queue} may '
                'wait for a slot; try again later.',
                code='rate_limit_exceeded',
            )

    def open(self, task: GenerationTask, automaton: TokenAutomaton | None) -> 'Call':
        """Submits a request and returns its call; must be called in the event loop.

        Args:
          task: the parsed request.
          automaton: the automaton of valid answers, or None.

        Raises:
          RequestError: if too many requests are open.
        """
        controls, longest = Controls(automaton=automaton), task.max_new_tokens
        if task.suffix is not None:
            gap = task.max_new_tokens or 0
            longest, controls = gap + len(task.suffix), self._suffix_controls(gap, task.suffix)
        return Call(
            self,
            lambda callback: self.worker.submit(
                callback,
                prompt=task.prompt,
                rng=task.seed,
                mode=task.mode,
                temperature=task.temperature,
                top_p=task.top_p,
                max_new_tokens=longest,
                stop=task.stop,
                # All positive numbers share the program with the maximum.
                logprobs=MAX_TOP_LOGPROBS if task.logprobs else task.logprobs,
                controls=controls,
                watch=task.watch and task.mode != 'autoregressive',
            ),
            len(task.prompt),
        )

    def _suffix_controls(self, gap: int, suffix: list[int]) -> Controls:
        """Returns controls for `gap` tokens without stop tokens, followed by the suffix."""
        return Controls(
            pinned=pin([[*[None] * gap, *suffix]]),
            allowed_sets=self._no_stops,
            allowed_index=np.array([[0] * gap + [OPEN] * len(suffix)], np.int32),
        )

    def frames(self) -> EventFrames:
        """Returns a converter from the events of a watched request to frames."""
        return EventFrames(self.tokenizer, self._sampler.config.stop_ids)

    def decide(self, decision: Decision) -> list[float]:
        """Returns the probabilities of the answers; must run in the thread of the worker.

        Raises:
          ValueError: if the model has no diffusion mode, or if `sampling.decide` raises it.
        """
        reason = self.limits.modes['diffusion']
        if reason is not None:
            raise ValueError(f'decisions need a diffusion model: {reason}')
        sampler = dataclasses.replace(self._sampler, mode='diffusion')
        # A decision only needs one canvas after the prompt, independent of max_new_tokens.
        config = dataclasses.replace(sampler.config, max_new_tokens=1)
        probabilities = decide(
            dataclasses.replace(sampler, config=config),
            self._params,
            *pad_prompts([decision.prompt], sampler.config.pad_id),
            decision.answers,
            rng=jax.random.key(decision.seed)[None],
            before=decision.before,
            after=decision.after,
            num_draws=decision.draws,
        )
        row: list[float] = np.asarray(probabilities)[0].tolist()
        return row

    def automaton(self, schema: Any) -> TokenAutomaton:
        """Returns the automaton of a JSON schema, from a cache if possible; thread-safe.

        The same object for equal schemas lets their requests share a group of the engine.

        Raises:
          RequestError: if the schema is not supported.
        """
        text = json.dumps(schema)
        with self._compiling:
            if text not in self._schemas:
                try:
                    automaton = from_json_schema(
                        schema,
                        self.tokenizer,
                        stop_ids=self._sampler.config.stop_ids,
                        vocab_size=self._vocab_size,
                    )
                except ValueError as error:
                    raise RequestError(400, str(error), 'response_format') from None
                self._schemas[text] = automaton
                if len(self._schemas) > _MAX_SCHEMAS:
                    self._schemas.popitem(last=False)
            self._schemas.move_to_end(text)
            return self._schemas[text]

    def gauges(self) -> dict[str, tuple[str, float]]:
        """Returns current values by metric name, each with its help text."""
        waiting, running = self.worker.load
        prefixes = self.worker.engine.prefixes
        reused = 0 if prefixes is None else prefixes.reused
        return {
            'requests_open': ('Requests that are not answered yet.', self.open_calls),
            'requests_waiting': ('Requests without a slot.', waiting),
            'requests_running': ('Requests in slots.', running),
            'slots': ('Slots of each group of requests.', self.worker.engine.slots),
            'queue_limit': ('Requests that may wait.', self.settings.max_queue),
            'prompt_tokens_reused': ('Prompt tokens that were encoded before.', reused),
        }

    def warm_up(self) -> Result:
        """Returns the answer to a short prompt.

        A call before the first request compiles the program, so that no client waits for it.
        """
        prompt = self.tokenizer.format_prompt('Hello')
        events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        temperature = self.limits.temperature
        self.worker.submit(events.put, prompt=prompt, temperature=temperature)
        while isinstance(event := events.get(), Delta):
            pass
        if isinstance(event, Failed | Refused) and isinstance(event.error, FIXABLE):
            raise event.error  # a setting of the server
        if not isinstance(event, Finished):
            raise RuntimeError(str(failure(event)))
        return event.result


class Call:
    """A request of a client in the event loop, with a queue of its events.

    Every call must be closed, which also cancels a request that is not answered yet.
    """

    def __init__(
        self,
        service: Service,
        start: Callable[[Callable[[WorkerEvent], None]], Ticket],
        prompt_tokens: int,
    ) -> None:
        """Starts the request.

        Args:
          service: the service.
          start: submits the request; its argument is a callback for events.
          prompt_tokens: the number of tokens of the prompt, for the metrics.

        Raises:
          RequestError: if too many requests are open.
        """
        service.check_room()
        self._service, self._prompt_tokens = service, prompt_tokens
        self._events: asyncio.Queue[WorkerEvent] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        service.open_calls += 1
        self._ticket = start(self._receive)

    def _receive(self, event: WorkerEvent) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the event loop has ended, so no client is waiting
            pass

    async def next(self) -> Event:
        """Returns the next event; raises RequestError if the engine rejected the request."""
        event = await self._events.get()
        if isinstance(event, Refused):
            raise RequestError(400, str(event.error))
        if isinstance(event, Delta):
            self._service.metrics.tokens(len(event.tokens))
        if isinstance(event, Finished):
            self._service.metrics.answer(self._prompt_tokens, event.result)
        return event

    async def result(self) -> Result:
        """Returns the complete answer; raises RequestError if the request fails."""
        while True:
            event = await self.next()
            if isinstance(event, Finished):
                return event.result
            if isinstance(event, End):
                raise failure(event)

    def close(self) -> None:
        """Cancels the request if it is not answered; later calls have no effect."""
        if not self._closed:
            self._closed = True
            self._service.open_calls -= 1
            self._service.worker.cancel(self._ticket)


def failure(event: WorkerEvent) -> RequestError:
    """Returns the error response for a request that failed or was rejected."""
    error = event.error if isinstance(event, Failed | Refused) else None
    return RequestError(503, f'The request failed: {error}'[:500])


def _refusal(sampler: Sampler, mode: str) -> str | None:
    """Returns the reason why the model does not support a mode, or None if it does."""
    try:
        dataclasses.replace(sampler, mode=mode)
    except ValueError as error:
        return str(error)
    return None
