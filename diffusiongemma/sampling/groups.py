"""Requests of one kind: those that wait, and those in the slots of one program."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import logging

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.events import Delta, DenoiseStep, End, Event, Failed, Finished, Result
from diffusiongemma.sampling.finite import not_finite
from diffusiongemma.sampling.slots import Entry, Slots
from diffusiongemma.sampling.state import SamplerOutput
from diffusiongemma.sampling.text import TextStream
from diffusiongemma.sampling.watch import Draft


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
        """Puts waiting requests into free slots; a prefill can give a first token."""
        free = [slot for slot in range(self.slots.size) if slot not in self.running]
        free = free[: len(self.waiting)]
        requests = [self.waiting.popleft() for _ in free]
        for slot, request in zip(free, requests, strict=True):
            stream = None if self._tokenizer is None else TextStream(self._tokenizer, request.stop)
            self.running[slot] = Row(request, stream)
        self.slots.insert([request.entry for request in requests], free)
        return self._read() if requests else []

    def advance(self, until_one_finishes: bool) -> list[Event]:
        """What is new after one more block, or after the blocks until a row is finished."""
        if until_one_finishes:
            self.slots.until_one_finishes()
        else:
            self.slots.advance()
        return self._read()

    def _read(self) -> list[Event]:
        """What is new after a block."""
        output, finished = self.slots.read()
        events: list[Event] = []
        stopped = []
        for slot, row in list(self.running.items()):
            news = self._news(row, slot, output, bool(finished[slot]))
            events += news
            if news and isinstance(news[-1], End):
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
        steps = int(output.denoising_steps[slot])
        events: list[Event] = [Delta(id, new, text, steps, scores)] if new else []
        stopped = row.stream is not None and row.stream.stopped
        if finished or stopped:
            self.slots.keep(slot, row.request.entry, row.tokens)
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
            self.release()
            return failed

    def release(self) -> None:
        """Gives the memory back; requests in slots are lost."""
        self.running = {}
        self.slots.release()

    def cancel(self, id: int) -> bool:
        """Whether there was a request of this number."""
        for request in self.waiting:
            if request.id == id:
                self.waiting.remove(request)
                return True
        for slot, row in list(self.running.items()):
            if row.request.id == id:
                del self.running[slot]
                self._stop([slot])
                return True
        return False

    def _stop(self, slots: Sequence[int]) -> None:
        """Ends rows that nobody waits for."""
        self.slots.stop(slots)


class WatchedGroup(Group):
    """Requests that are watched: their blocks are taken step by step, and shown."""

    def __init__(self, slots: Slots, tokenizer: Tokenizer | None, shared: tuple) -> None:
        super().__init__(slots, tokenizer, shared)
        self._block: Iterator[Draft] | None = None  # what is left of the block on its way
        self._stepped: set[int] = set()  # slots that took a step of it
        self._left: list[int] = []  # slots to stop after it

    def fill(self) -> list[Event]:
        """Puts waiting requests into free slots, between two blocks."""
        return super().fill() if self._block is None else []

    def advance(self, until_one_finishes: bool) -> list[Event]:
        """What the next denoise step shows; after the last one of a block, what is new."""
        del until_one_finishes  # a step is the news
        if self._block is None:
            self._block, self._stepped = self.slots.steps(), set()
        draft = next(self._block, None)
        if draft is not None:
            return self._shown(jax.device_get(draft))
        self._block = None
        self._stop([])
        return self._read()

    def release(self) -> None:
        super().release()
        self._block, self._left = None, []

    def _shown(self, draft: Draft) -> list[Event]:
        """The draft of each row that took the step, or whose noise it is."""
        events: list[Event] = []
        for slot, row in self.running.items():
            is_noise = draft.step == 0 and slot not in self._stepped
            if draft.changing[slot]:
                self._stepped.add(slot)
            if draft.changing[slot] or is_noise:
                events.append(DenoiseStep(row.request.id, draft.row(slot)))
        return events

    def _stop(self, slots: Sequence[int]) -> None:
        """Ends rows after the block that is on its way, which holds the state."""
        self._left += slots
        if not self.running:  # and nobody waits for its end
            self._block = None
        if self._block is None and self._left:
            super()._stop(self._left)
            self._left = []
