"""What a server knows: the model, the worker, limits, who may ask, and how many ask now."""

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
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling.controls import OPEN, Controls, ban, pin
from diffusiongemma.sampling.decide import decide
from diffusiongemma.sampling.engine import Delta, Engine, Finished, Result
from diffusiongemma.sampling.events import End, Event
from diffusiongemma.sampling.passes import canvas_length
from diffusiongemma.sampling.prompts import pad_prompts
from diffusiongemma.sampling.sampler import MODES, Sampler
from diffusiongemma.serving.fields import RequestError
from diffusiongemma.serving.metrics import Metrics
from diffusiongemma.serving.protocol import MAX_TOP_LOGPROBS, Ask, Decision, Limits
from diffusiongemma.serving.worker import News, Refused, Ticket, Worker
from diffusiongemma.view.frames import EventFrames

_MAX_SCHEMAS = 16  # compiled ones that are kept


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server is run.

    Attributes:
      name: of the model, in requests and answers.
      max_queue: requests that may wait while all slots are taken.
      api_key: what clients must send; None lets everyone in.
      max_body_bytes: longest body of a request.
      body_seconds: how long a body may take to arrive.
    """

    name: str
    max_queue: int = 64
    api_key: str | None = None
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0


class Service:
    """Opens calls on a worker.

    Attributes:
      limits: what a request may ask for.
      draining: whether new requests are refused since the server is about to end.
      open_calls: requests that are not answered yet.
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
          engine: with this tokenizer.
          params: the model's parameters.
          tokenizer: the model's tokenizer.
          settings: how the server is run.
          temperature: of requests that name none.
        """
        self.settings, self.tokenizer, self.metrics = settings, tokenizer, Metrics()
        self._params, self._sampler, self.capacity = params, engine.sampler, engine.capacity
        self.limits = Limits(
            max_new_tokens=engine.sampler.config.max_new_tokens,
            canvas_length=canvas_length(engine.sampler.model),
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
        return self._sampler.model.config.vocab_size

    def admit(self, key: str | None) -> None:
        """Raises RequestError when a request with this API key may not come in now."""
        secret = self.settings.api_key
        if secret is not None and not hmac.compare_digest((key or '').encode(), secret.encode()):
            raise RequestError(
                401, "The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                code='invalid_api_key',
            )  # fmt: skip
        if self.draining:
            raise RequestError(503, 'The server is shutting down; ask another one.')

    def check_room(self) -> None:
        """Raises RequestError when too many requests wait."""
        if self.open_calls >= self._max_open:
            raise RequestError(
                429,
                f'{self.open_calls} requests are open, of which {self.settings.max_queue} may wait '
                'for a slot; try again later.',
                code='rate_limit_exceeded',
            )

    def open(self, ask: Ask, automaton: TokenAutomaton | None) -> 'Call':
        """A call that is answered by the engine; for the event loop."""
        controls, longest = Controls(automaton=automaton), ask.max_new_tokens
        if ask.suffix is not None:
            gap = ask.max_new_tokens or 0
            longest, controls = gap + len(ask.suffix), self._around(gap, ask.suffix)
        return Call(
            self,
            lambda tell: self.worker.submit(
                tell,
                prompt=ask.prompt,
                rng=ask.seed,
                mode=ask.mode,
                temperature=ask.temperature,
                top_p=ask.top_p,
                max_new_tokens=longest,
                stop=ask.stop,
                # One program for every number of them.
                logprobs=MAX_TOP_LOGPROBS if ask.logprobs else ask.logprobs,
                controls=controls,
                watch=ask.watch and ask.mode != 'autoregressive',
            ),
            len(ask.prompt),
        )

    def _around(self, gap: int, suffix: list[int]) -> Controls:
        """Controls of a response of `gap` tokens, none of which ends it, and then the suffix."""
        return Controls(
            pinned=pin([[*[None] * gap, *suffix]]),
            allowed_sets=self._no_stops,
            allowed_index=np.array([[0] * gap + [OPEN] * len(suffix)], np.int32),
        )

    def frames(self) -> EventFrames:
        """Makes the frames of a watched request."""
        return EventFrames(self.tokenizer, self._sampler.config.stop_ids)

    def decide(self, decision: Decision) -> list[float]:
        """Probabilities of the answers; for the worker's thread. Raises ValueError."""
        reason = self.limits.modes['diffusion']
        if reason is not None:
            raise ValueError(f'decisions need a diffusion model: {reason}')
        sampler = dataclasses.replace(self._sampler, mode='diffusion')
        # A decision takes one canvas after the prompt, however long answers may be.
        config = dataclasses.replace(sampler.config, max_new_tokens=1)
        chances = decide(
            dataclasses.replace(sampler, config=config),
            self._params,
            *pad_prompts([decision.prompt], sampler.config.pad_id),
            decision.answers,
            rng=jax.random.key(decision.seed)[None],
            before=decision.before,
            after=decision.after,
            num_draws=decision.draws,
        )
        return np.asarray(chances)[0].tolist()

    def automaton(self, schema: Any) -> TokenAutomaton:
        """The automaton of a JSON schema, the same object for the same text; for any thread.

        Raises:
          RequestError: the schema is not supported.
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
        """Numbers of this moment, each with its help."""
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
        """Answers a short prompt, so that the first client does not wait for the compiler."""
        prompt = self.tokenizer.format_prompt('Hello')
        answered: queue.SimpleQueue[News] = queue.SimpleQueue()
        temperature = self.limits.temperature
        self.worker.submit(answered.put, prompt=prompt, temperature=temperature)
        while isinstance(news := answered.get(), Delta):
            pass
        if not isinstance(news, Finished):
            raise RuntimeError(str(failure(news)))
        return news.result


class Call:
    """A request of a client: it waits for news and tells the worker when it is given up.

    Each call must be closed.
    """

    def __init__(
        self,
        service: Service,
        start: Callable[[Callable[[News], None]], Ticket],
        prompt_tokens: int,
    ) -> None:
        """Starts the work; raises RequestError when too many requests wait."""
        service.check_room()
        self._service, self._prompt_tokens = service, prompt_tokens
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        service.open_calls += 1
        self._ticket = start(self._tell)

    def _tell(self, news: News) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
        except RuntimeError:  # the event loop has ended, and nobody waits
            pass

    async def next(self) -> Event:
        """The next news; raises RequestError when the engine refused the request."""
        news = await self._news.get()
        if isinstance(news, Refused):
            raise RequestError(400, str(news.error))
        if isinstance(news, Delta):
            self._service.metrics.tokens(len(news.tokens))
        if isinstance(news, Finished):
            self._service.metrics.answer(self._prompt_tokens, news.result)
        return news

    async def result(self) -> Result:
        """The whole answer; raises RequestError when there is none."""
        while True:
            news = await self.next()
            if isinstance(news, Finished):
                return news.result
            if isinstance(news, End):
                raise failure(news)

    def close(self) -> None:
        """Gives the request up where it is not answered; may be called twice."""
        if not self._closed:
            self._closed = True
            self._service.open_calls -= 1
            self._service.worker.cancel(self._ticket)


def failure(news: News) -> RequestError:
    """What a client is told of a request whose program failed."""
    error = getattr(news, 'error', None)
    return RequestError(503, f'The request failed: {error}'[:500])


def _refusal(sampler: Sampler, mode: str) -> str | None:
    """Why a model has no such mode; None where it has."""
    try:
        dataclasses.replace(sampler, mode=mode)
    except ValueError as error:
        return str(error)
    return None
