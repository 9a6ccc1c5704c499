"""Requests of one kind: those that wait, and those in the slots of one program."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.events import Delta, Event, Failed, Finished, Result
from diffusiongemma.sampling.finite import not_finite
from diffusiongemma.sampling.slots import Entry, Slots
from diffusiongemma.sampling.state import SamplerOutput
from diffusiongemma.sampling.text import TextStream


@dataclasses.dataclass(frozen=True)
class Request:
    """A request on its way: what it asks, and where its text ends."""

    id: int
    entry: Entry
    stop: tuple[str, ...]
    limit: int


@dataclasses.dataclass
class Row:
    """A request in a slot: what its events have told."""

    request: Request
    stream: TextStream | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)


class Group:
    """Requests that one program serves: those in slots, and those that wait."""

    def __init__(self, slots: Slots, tokenizer: Tokenizer | None, shared: tuple) -> None:
        self.slots = slots
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: dict[int, Row] = {}  # by slot
        self._tokenizer = tokenizer
        self._shared = shared  # kept, since the group is found by their ids

    def fill(self) -> list[Event]:
        """Puts waiting requests into free slots."""
        free = [slot for slot in range(self.slots.size) if slot not in self.running]
        free = free[: len(self.waiting)]
        requests = [self.waiting.popleft() for _ in free]
        for slot, request in zip(free, requests, strict=True):
            stream = None if self._tokenizer is None else TextStream(self._tokenizer, request.stop)
            self.running[slot] = Row(request, stream)
        self.slots.insert([request.entry for request in requests], free)
        return []

    def advance(self, until_one_finishes: bool) -> list[Event]:
        """What is new after one more block, or after the blocks until a row is finished."""
        if until_one_finishes:
            self.slots.until_one_finishes()
        else:
            self.slots.advance()
        output, finished = self.slots.read()
        events: list[Event] = []
        stopped = []
        for slot, row in list(self.running.items()):
            news = self._news(row, slot, output, bool(finished[slot]))
            events += news
            if news and isinstance(news[-1], Finished | Failed):
                del self.running[slot]
                if not finished[slot]:
                    stopped.append(slot)
        if stopped:
            self.slots.stop(stopped)
        return events

    def _news(self, row: Row, slot: int, output: SamplerOutput, finished: bool) -> list[Event]:
        id, before = row.request.id, len(row.tokens)
        if output.failed_pass[slot]:
            return [Failed(id, not_finite(int(output.failed_pass[slot]), f'row {id}'))]
        new = output.tokens[slot, before : int(output.lengths[slot])].tolist()
        row.tokens += new
        text = ''
        if row.stream is not None:
            text = row.stream.push(new)
            if finished and not row.stream.stopped:
                text += row.stream.finish()
        row.texts.append(text)
        scores = output.scores
        if scores is not None:
            scores = jax.tree.map(lambda leaf: leaf[slot, before : before + len(new)], scores)
        events: list[Event] = [Delta(id, new, text, scores)] if new else []
        stopped = row.stream is not None and row.stream.stopped
        if finished or stopped:
            events.append(Finished(id, self._result(row, slot, output, stopped)))
        return events

    def _result(self, row: Row, slot: int, output: SamplerOutput, stopped: bool) -> Result:
        sampler, lengths = self.slots.sampler, output.accepted_lengths
        by_token = bool(row.tokens) and row.tokens[-1] in sampler.config.stop_ids
        return Result(
            tokens=row.tokens,
            text=''.join(row.texts),
            reason='stop' if stopped or by_token else 'length',
            mode=sampler.mode,
            denoising_steps=int(output.denoising_steps[slot]),
            canvases=int(output.canvases[slot]),
            causal_passes=int(output.causal_passes[slot]),
            accepted_lengths=None if lengths is None else np.asarray(lengths[slot]),
            scores=jax.tree.map(lambda leaf: leaf[slot, : len(row.tokens)], output.scores),
        )

    def guarded(self, work: Callable[[], list[Event]]) -> list[Event]:
        """The events of `work`; where it fails, the failures of all requests in slots."""
        try:
            return work()
        except Exception as error:  # whatever a program may raise: other groups go on
            logging.debug('a group of the engine failed', exc_info=True)
            failed: list[Event] = [Failed(row.request.id, error) for row in self.running.values()]
            self.running = {}
            self.slots.release()
            return failed

    def cancel(self, id: int) -> bool:
        """Whether there was a request of this number."""
        for request in self.waiting:
            if request.id == id:
                self.waiting.remove(request)
                return True
        for slot, row in list(self.running.items()):
            if row.request.id == id:
                del self.running[slot]
                self.slots.stop([slot])
                return True
        return False
