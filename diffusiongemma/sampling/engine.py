"""Requests that come at any time, answered side by side in a fixed number of rows.

submit -> while requests are there { step: fill free slots -> one block of every row -> events }.
A block is a canvas, a token or a verified draft; between blocks rows are refilled and cancelled.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.controls import OPEN, Controls
from diffusiongemma.sampling.finite import not_finite
from diffusiongemma.sampling.randomness import typed_key
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.slots import Entry, Slots
from diffusiongemma.sampling.state import SamplerOutput
from diffusiongemma.sampling.text import TextStream, check_stops

_DEFAULT_CAPACITY = 4096


@dataclasses.dataclass(frozen=True)
class Result:
    """A response and what it cost.

    Attributes:
      tokens: all token ids, the stop token included.
      text: the answer; '' for an engine without a tokenizer.
      reason: 'stop', a stop token or stop text came, or 'length'.
      mode: the decode mode.
      denoising_steps, canvases, causal_passes: as in SamplerOutput, of this row.
      accepted_lengths: [K + 2] int32 in the lossless mode, as in SamplerOutput, else None.
    """

    tokens: list[int]
    text: str
    reason: str
    mode: str
    denoising_steps: int
    canvases: int
    causal_passes: int
    accepted_lengths: np.ndarray | None

    @property
    def passes(self) -> int:
        """Denoise passes, commits and verifications; the prefill is not counted."""
        return self.denoising_steps + self.causal_passes

    @property
    def tokens_per_pass(self) -> float:
        return len(self.tokens) / max(self.passes, 1)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What the response of request `id` gained in a step: token ids, and text that is certain."""

    id: int
    tokens: list[int]
    text: str


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of a request that was answered."""

    id: int
    result: Result


@dataclasses.dataclass(frozen=True)
class Failed:
    """The last event of a request whose program failed, such as for lack of memory."""

    id: int
    error: Exception


Event = Delta | Finished | Failed


class Engine:
    """Answers requests of every mode, side by side.

        engine = Engine(sampler, params, tokenizer, slots=8)
        ids = [engine.submit(tokenizer.format_prompt(text), rng=7) for text in texts]
        results = {e.id: e.result for e in engine.run() if isinstance(e, Finished)}

    A response depends on its request alone: on the prompt, the key, the mode and the controls, not
    on what else is asked, when, or in which order. Requests whose programs differ are answered in
    groups, each of which has slots and a K/V cache of its own: by mode, by whether they are greedy,
    and by which controls they have. Those with an automaton or with allowed sets share a group
    where these are the same object.

    It is for one thread.

    Attributes:
      sampler: what a request does not say otherwise.
      capacity: most tokens of a prompt and its response.
      slots: rows of a group.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Any,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        capacity: int | None = None,
        multiple: int = 64,
        max_groups: int = 4,
        prefill_together: int = 1,
    ):
        """Compiles and allocates nothing before the first request.

        Args:
          sampler: what a request does not say otherwise; `max_new_tokens` is the longest response.
          params: the model's parameters.
          tokenizer: for texts in the events; None for token ids alone.
          slots: rows of a group.
          capacity: most tokens of a prompt and its response; None for the model's positions, at
            most 4,096.
          multiple: prompts are padded to this number times a power of two.
          max_groups: groups that have a K/V cache at one time.
          prefill_together: how many prompts of a group one pass may encode. With 1 a response is
            computed by the same programs whatever else is asked; with more it is the same up to
            the order of float sums.

        Raises:
          ValueError: a number is out of range, or the sampler would not stop at the tokenizer's
            end of turn.
        """
        positions = getattr(sampler.model.config, 'max_positions', None)
        self.capacity = capacity or min(positions or _DEFAULT_CAPACITY, _DEFAULT_CAPACITY)
        numbers = {
            'slots': slots, 'capacity': self.capacity, 'multiple': multiple,
            'max_groups': max_groups, 'prefill_together': prefill_together,
        }  # fmt: skip
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f'{name} must be >= 1, got {number}.')
        if positions is not None and self.capacity > positions:
            raise ValueError(
                f'capacity={self.capacity} is more than the {positions} positions of the model. '
                f'Lower it to at most {positions}.'
            )
        if tokenizer is not None:
            check_stops(sampler, tokenizer)
        # No response can be longer than its slot: what it may hold is made no wider.
        limit = min(sampler.config.max_new_tokens, self.capacity)
        config = dataclasses.replace(sampler.config, max_new_tokens=limit)
        self.sampler = dataclasses.replace(sampler, config=config)
        self._params, self._tokenizer = params, tokenizer
        self._shape = {
            'slots': slots, 'capacity': self.capacity, 'multiple': multiple,
            'together': prefill_together,
        }  # fmt: skip
        self.slots, self._max_groups = slots, max_groups
        self._groups: dict[Any, _Group] = {}
        self._ids = itertools.count()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        rng: int | jax.Array = 0,
        mode: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        controls: Controls | None = None,
    ) -> int:
        """Appends a request to the queue of its group and returns its number.

        Args:
          prompt: token ids.
          rng: a key, or the number of one.
          mode: in place of the sampler's.
          temperature, top_p: in place of the config's.
          max_new_tokens: longest response; None for the config's, or less where the slot has no
            room for so many.
          stop: texts of which the first to come ends the response.
          controls: the other settings and constraints, of one row [1, ...]; it may hold the three
            numbers too, where they are not given above.

        Raises:
          ValueError: as a call of the sampler; or the request does not fit into a slot, or says a
            number twice, or names stop texts to an engine without a tokenizer.
        """
        controls = Controls() if controls is None else controls
        if stop and self._tokenizer is None:
            raise ValueError('stop texts need an engine with a tokenizer.')
        if '' in stop:
            raise ValueError("a stop text must not be empty, got ''.")
        numbers = {'temperature': temperature, 'top_p': top_p, 'max_new_tokens': max_new_tokens}
        for name, number in numbers.items():
            if number is not None and getattr(controls, name) is not None:
                raise ValueError(f'{name}={number} is given beside controls.{name}; give one.')
        sampler = self._sampler(mode, temperature)
        if temperature:
            controls = controls.replace(temperature=np.full(1, temperature, np.float32))
        if top_p is not None and sampler.config.temperature > 0:
            controls = controls.replace(top_p=np.full(1, top_p, np.float32))
        limit = self._limit(prompt, max_new_tokens, controls)
        controls = controls.replace(max_new_tokens=np.full(1, limit, np.int32))
        key = typed_key(jax.random.key(rng) if isinstance(rng, int) else rng).reshape(1)
        # Checked as a call that has no more room than this request takes.
        config = dataclasses.replace(sampler.config, max_new_tokens=max(limit, 1))
        tokens = np.asarray(prompt).reshape(1, -1)
        narrow = dataclasses.replace(sampler, config=config)
        narrow.checked(tokens, np.array([len(prompt)]), key, controls)
        controls = _widened(controls, self.sampler.config.max_new_tokens)
        request = _Request(next(self._ids), Entry(list(prompt), key, controls), tuple(stop), limit)
        self._group(sampler, controls).waiting.append(request)
        return request.id

    def step(self, *, until_one_finishes: bool = False) -> list[Event]:
        """Fills free slots, takes one block of every row, and says what came of it.

        Args:
          until_one_finishes: takes as many blocks in one program as it needs until a row of each
            group is finished: fewer waits for the device, and later news.
        """
        events: list[Event] = []
        for group in self._refillable():
            events += group.guarded(group.fill)
        for group in list(self._groups.values()):
            if group.running:
                events += group.guarded(functools.partial(group.advance, until_one_finishes))
        return events

    def run(self, *, until_one_finishes: bool = False) -> Iterator[Event]:
        """Yields the events of steps until every request is answered."""
        while self.waiting or self.running:
            yield from self.step(until_one_finishes=until_one_finishes)

    def cancel(self, id: int) -> bool:
        """Drops a request, of which no event follows; False where there is none of this number."""
        return any(group.cancel(id) for group in self._groups.values())

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return sum(len(group.waiting) for group in self._groups.values())

    @property
    def running(self) -> int:
        """Requests in slots."""
        return sum(len(group.running) for group in self._groups.values())

    def _sampler(self, mode: str | None, temperature: float | None) -> Sampler:
        """The sampler of a request; a greedy one is known to be so when it is compiled."""
        sampler = self.sampler
        if temperature is not None:
            # Of another temperature than 0 the row's number counts, and one program serves all.
            known = 0.0 if temperature == 0 else 1.0
            config = dataclasses.replace(sampler.config, temperature=known)
            sampler = dataclasses.replace(sampler, config=config)
        return sampler if mode is None else dataclasses.replace(sampler, mode=mode)

    def _limit(self, prompt: Sequence[int], limit: int | None, controls: Controls) -> int:
        room, most = self.capacity - len(prompt), self.sampler.config.max_new_tokens
        if not len(prompt):
            raise ValueError('The prompt is empty; a prompt holds at least the bos token.')
        if controls.max_new_tokens is not None:
            limit = int(np.asarray(controls.max_new_tokens).reshape(()))
        if limit is None and room >= 1:
            return min(most, room)
        limit = 1 if limit is None else limit
        if not 0 <= limit <= most:
            raise ValueError(f'max_new_tokens must lie in [0, {most}], got {limit}.')
        if limit > room:
            raise ValueError(
                f'The prompt has {len(prompt)} tokens; with {limit} new ones that is more than '
                f'the capacity of {self.capacity}. Shorten the prompt, or ask for fewer tokens.'
            )
        return limit

    def _group(self, sampler: Sampler, controls: Controls) -> '_Group':
        shared = (controls.allowed_sets, controls.automaton)
        rows = controls.replace(allowed_sets=None, automaton=None)
        leaves, structure = jax.tree.flatten(rows)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        name = (sampler, structure, shapes, *map(id, shared))
        if name not in self._groups:
            used = {n: g for n, g in self._groups.items() if g.waiting or g.slots.allocated}
            self._groups = used
            slots = Slots(sampler, self._params, **self._shape)
            self._groups[name] = _Group(slots, self._tokenizer, shared)
        return self._groups[name]

    def _refillable(self) -> Iterator['_Group']:
        """Groups with waiting requests, the longest waiting one first.

        Where there is no room for one more K/V cache, no later request goes first, so that the
        groups that have one run empty.
        """
        waiting = [group for group in self._groups.values() if group.waiting]
        for group in sorted(waiting, key=lambda group: group.waiting[0].id):
            if not group.slots.allocated and not self._make_room():
                return
            yield group

    def _make_room(self) -> bool:
        """Whether one more group may have a K/V cache, after an idle one gave its own back."""
        allocated = [group for group in self._groups.values() if group.slots.allocated]
        if len(allocated) < self._max_groups:
            return True
        idle = [group for group in allocated if not group.running]
        if not idle:
            return False
        idle[0].slots.release()
        return True


@dataclasses.dataclass(frozen=True)
class _Request:
    id: int
    entry: Entry
    stop: tuple[str, ...]
    limit: int


@dataclasses.dataclass
class _Row:
    """A request in a slot: what its events have told."""

    request: _Request
    stream: TextStream | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)


class _Group:
    """Requests that one program serves: those in slots, and those that wait."""

    def __init__(self, slots: Slots, tokenizer: Tokenizer | None, shared: tuple):
        self.slots = slots
        self.waiting: collections.deque[_Request] = collections.deque()
        self.running: dict[int, _Row] = {}  # by slot
        self._tokenizer = tokenizer
        self._shared = shared  # kept, since the group is found by their ids

    def fill(self) -> list[Event]:
        """Puts waiting requests into free slots."""
        free = [slot for slot in range(self.slots.size) if slot not in self.running]
        free = free[: len(self.waiting)]
        requests = [self.waiting.popleft() for _ in free]
        for slot, request in zip(free, requests, strict=True):
            stream = None if self._tokenizer is None else TextStream(self._tokenizer, request.stop)
            self.running[slot] = _Row(request, stream)
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

    def _news(self, row: _Row, slot: int, output: SamplerOutput, finished: bool) -> list[Event]:
        id, before = row.request.id, len(row.tokens)
        if output.failed_pass[slot]:
            return [Failed(id, not_finite(output.failed_pass[slot], f'row {id}'))]
        new = output.tokens[slot, before : int(output.lengths[slot])].tolist()
        row.tokens += new
        text = ''
        if row.stream is not None:
            text = row.stream.push(new)
            if finished and not row.stream.stopped:
                text += row.stream.finish()
        row.texts.append(text)
        events: list[Event] = [Delta(id, new, text)] if new else []
        stopped = row.stream is not None and row.stream.stopped
        if finished or stopped:
            events.append(Finished(id, self._result(row, slot, output, stopped)))
        return events

    def _result(self, row: _Row, slot: int, output: SamplerOutput, stopped: bool) -> Result:
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
            accepted_lengths=None if lengths is None else lengths[slot],
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


def _widened(controls: Controls, width: int) -> Controls:
    """The same controls with the same number of positions in all requests."""

    def widen(table: jax.Array | None) -> jax.Array | None:
        if table is None:
            return None
        table = np.asarray(table, np.int32)[:, :width]
        return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=OPEN)

    return controls.replace(
        pinned=widen(controls.pinned),
        seed=widen(controls.seed),
        allowed_index=widen(controls.allowed_index),
    )
