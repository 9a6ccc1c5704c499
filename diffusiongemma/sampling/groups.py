"""A group of requests that share one compiled program: a queue and the slots of a batch."""

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
    """A request in the engine.

    Attributes:
      id: the number of the request.
      entry: the prompt, the key and the controls of its row.
      stop: stop texts; the first one that occurs ends the response.
      limit: the maximum number of tokens of the response.
    """

    id: int
    entry: Entry
    stop: tuple[str, ...]
    limit: int


@dataclasses.dataclass
class Row:
    """A request in a slot, with the tokens and texts that its events have reported.

    Attributes:
      request: the request in the slot.
      stream: the incremental decoder of its text; None without a tokenizer.
      tokens: all reported token ids.
      texts: the reported parts of the text.
    """

    request: Request
    stream: TextStream | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)


class Group:
    """A queue of requests and the slots in which one compiled program answers them.

    Attributes:
      slots: the batch of the running requests.
      waiting: the requests without a slot, oldest first.
      running: the requests in slots, by slot.
    """

    def __init__(
        self, slots: Slots, tokenizer: Tokenizer | None, shared: tuple[object, ...]
    ) -> None:
        self.slots = slots
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: dict[int, Row] = {}
        self._tokenizer = tokenizer
        self._shared = shared  # keeps the objects alive, because their ids identify the group

    def fill(self) -> list[Event]:
        """Moves waiting requests into free slots; returns events, as a prefill may emit a token."""
        free = [slot for slot in range(self.slots.size) if slot not in self.running]
        free = free[: len(self.waiting)]
        requests = [self.waiting.popleft() for _ in free]
        for slot, request in zip(free, requests, strict=True):
            stream = None if self._tokenizer is None else TextStream(self._tokenizer, request.stop)
            self.running[slot] = Row(request, stream)
        self.slots.insert([request.entry for request in requests], free)
        return self._read() if requests else []

    def advance(self, until_one_finishes: bool) -> list[Event]:
        """Decodes one block, or blocks until a row finishes, and returns the events."""
        if until_one_finishes:
            self.slots.until_one_finishes()
        else:
            self.slots.advance()
        return self._read()

    def _read(self) -> list[Event]:
        """Returns the events of the latest block; frees slots whose requests have ended."""
        output, finished = self.slots.read()
        events: list[Event] = []
        stopped = []
        for slot, row in list(self.running.items()):
            row_events = self._row_events(row, slot, output, bool(finished[slot]))
            events += row_events
            if row_events and isinstance(row_events[-1], End):
                del self.running[slot]
                if not finished[slot]:
                    stopped.append(slot)
        if stopped:
            self.slots.stop(stopped)
        return events

    def _row_events(
        self, row: Row, slot: int, output: SamplerOutput, finished: bool
    ) -> list[Event]:
        """Returns the events of one row since it was last read, and updates the row."""
        id, before = row.request.id, len(row.tokens)
        if output.failed_pass[slot]:
            return [Failed(id, not_finite(int(output.failed_pass[slot]), f'request {id}'))]
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
        """Returns the events of `work`; if it raises, `Failed` events of all running requests."""
        try:
            return work()
        except Exception as error:  # any error of a program; other groups continue
            logging.debug('a group of the engine failed', exc_info=True)
            failed: list[Event] = [Failed(row.request.id, error) for row in self.running.values()]
            self.release()
            return failed

    def release(self) -> None:
        """Frees the memory and drops the requests in slots."""
        self.running = {}
        self.slots.release()

    def cancel(self, id: int) -> bool:
        """Drops the request with this number; returns whether the group had it."""
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
        """Stops the rows of cancelled requests."""
        self.slots.stop(slots)


class WatchedGroup(Group):
    """A group of watched requests, whose blocks run one denoise step at a time."""

    def __init__(
        self, slots: Slots, tokenizer: Tokenizer | None, shared: tuple[object, ...]
    ) -> None:
        super().__init__(slots, tokenizer, shared)
        self._block: Iterator[Draft] | None = None  # remaining steps of the current block
        self._stepped: set[int] = set()  # slots that took part in a step of the block
        self._cancelled: list[int] = []  # slots to stop after the block

    def fill(self) -> list[Event]:
        """Moves waiting requests into free slots, only between two blocks."""
        return super().fill() if self._block is None else []

    def advance(self, until_one_finishes: bool) -> list[Event]:
        """Runs one denoise step, or completes the block after the last one; returns the events."""
        del until_one_finishes  # watched rows report every step
        if self._block is None:
            self._block, self._stepped = self.slots.steps(), set()
        draft = next(self._block, None)
        if draft is not None:
            return self._step_events(jax.device_get(draft))
        self._block = None
        self._stop([])
        return self._read()

    def release(self) -> None:
        super().release()
        self._block, self._cancelled = None, []

    def _step_events(self, draft: Draft) -> list[Event]:
        """Returns the events of the rows that took the step, or that start with this noise."""
        events: list[Event] = []
        for slot, row in self.running.items():
            is_noise = draft.step == 0 and slot not in self._stepped
            if draft.changing[slot]:
                self._stepped.add(slot)
            if draft.changing[slot] or is_noise:
                events.append(DenoiseStep(row.request.id, draft.row(slot)))
        return events

    def _stop(self, slots: Sequence[int]) -> None:
        """Stops rows after the current block, which owns the state."""
        self._cancelled += slots
        if not self.running:  # the rest of the block is not needed
            self._block = None
        if self._block is None and self._cancelled:
            super()._stop(self._cancelled)
            self._cancelled = []
