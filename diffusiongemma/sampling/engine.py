"""An engine with continuous batching: it decodes requests in a fixed number of batch rows.

submit -> while requests are unanswered { step: fill free slots -> one block per row -> events }.
A block is a canvas, a token or a verified draft; rows are refilled and cancelled between blocks.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import AnyArray, Params
from diffusiongemma.sampling.controls import OPEN, Controls
from diffusiongemma.sampling.events import Delta, DenoiseStep, Event, Failed, Finished, Result
from diffusiongemma.sampling.groups import Group, Request, WatchedGroup
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.prefixes import ConversationCache, PrefixCache
from diffusiongemma.sampling.randomness import typed_key
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.slots import Entry, Slots
from diffusiongemma.sampling.text import check_stops
from diffusiongemma.sampling.watch import check_has_canvas

__all__ = ['Delta', 'DenoiseStep', 'Engine', 'Event', 'Failed', 'Finished', 'Result']

_DEFAULT_CAPACITY = 4096


class Engine:
    """An engine that answers requests in all decode modes concurrently.

        engine = Engine(sampler, params, tokenizer, slots=8)
        ids = [engine.submit(tokenizer.format_prompt(text), rng=7) for text in texts]
        results = {e.id: e.result for e in engine.run() if isinstance(e, Finished)}

    A response depends only on the prompt, the key, the mode and the controls of its request, not
    on other requests or on the order in which they arrive. Requests that need different programs
    are answered in separate groups, each with its own slots and K/V cache. Groups differ in the
    mode, in whether their requests are greedy or watched, and in the controls that are set.
    Requests with an automaton or allowed sets share a group if these are the same objects. The
    engine is not thread-safe.

    Attributes:
      sampler: the sampler whose mode and config are the defaults of all requests.
      capacity: the maximum number of tokens of a prompt and its response.
      slots: the number of rows of a group.
      prefixes: the cache of shared prompt prefixes, or None.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        capacity: int | None = None,
        multiple: int = 64,
        max_groups: int = 4,
        prefill_together: int = 1,
        prefixes: int = 0,
        prefix_block: int = 128,
    ) -> None:
        """Creates an engine; nothing is compiled or allocated before the first request.

        Args:
          sampler: its mode and config are the defaults of all requests, and its `max_new_tokens`
            limits every response.
          params: the parameters of the model.
          tokenizer: decodes the texts of the events; with None, they only contain token ids.
          slots: the number of rows of a group.
          capacity: the maximum number of tokens of a prompt and its response; None for the number
            of positions of the model, at most 4,096.
          multiple: prompts are padded to this length times a power of two.
          max_groups: the maximum number of groups that have a K/V cache at the same time.
          prefill_together: the maximum number of prompts of a group that one pass encodes. With 1,
            other requests do not change the programs that compute a response; with more, responses
            are equal up to the order of float sums.
          prefixes: the maximum number of shared prompt prefixes whose K/V caches (one row each)
            are kept for reuse. If it is not 0, prompts longer than `prefix_block` are always
            encoded block by block, so reuse changes no response. Needs `prefill_together=1`.
          prefix_block: the number of tokens of a block.

        Raises:
          ValueError: if a number is out of range, or if the sampler does not stop at the
            tokenizer's end of turn.
        """
        positions = traits(sampler.model).max_positions
        self.capacity = capacity or min(positions or _DEFAULT_CAPACITY, _DEFAULT_CAPACITY)
        numbers = {
            'slots': slots, 'capacity': self.capacity, 'multiple': multiple,
            'max_groups': max_groups, 'prefill_together': prefill_together,
            'prefix_block': prefix_block,
        }  # fmt: skip
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f'{name} must be >= 1, got {number!r}; it is a whole number.')
        if prefixes and prefill_together > 1:
            raise ValueError(
                f'prefixes={prefixes} needs prompts that are encoded one by one, got '
                f'prefill_together={prefill_together}; leave one of them out.'
            )
        if positions is not None and self.capacity > positions:
            raise ValueError(
                f'capacity={self.capacity} is more than the {positions} positions of the model. '
                f'Lower it to at most {positions}.'
            )
        if tokenizer is not None:
            check_stops(sampler, tokenizer)
        # A response cannot be longer than its slot, so its arrays need not be wider.
        limit = min(sampler.config.max_new_tokens, self.capacity)
        config = dataclasses.replace(sampler.config, max_new_tokens=limit)
        self.sampler = dataclasses.replace(sampler, config=config)
        self._tokenizer = tokenizer
        self.prefixes: PrefixCache | None = None
        if prefixes:
            shape = {'block': prefix_block, 'entries': prefixes, 'capacity': self.capacity}
            self.prefixes = PrefixCache(sampler.model, params, **shape)
        self._new_slots = functools.partial(
            Slots, params=params, slots=slots, capacity=self.capacity, multiple=multiple,
            together=prefill_together, prefixes=self.prefixes,
        )  # fmt: skip
        self.slots, self._max_groups, self._together = slots, max_groups, prefill_together
        self._groups: dict[Any, Group] = {}
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
        logprobs: int | None = None,
        controls: Controls | None = None,
        conversation: ConversationCache | None = None,
        watch: bool = False,
    ) -> int:
        """Appends a request to the queue of its group and returns its number.

        Args:
          prompt: the token ids of the prompt.
          rng: a key, or the seed of one.
          mode: the decode mode; None for the mode of the sampler.
          temperature, top_p: the sampling settings; None for those of the config.
          max_new_tokens: the maximum length of the response; None for that of the config, or less
            if the slot has less room.
          stop: stop texts; the first one that occurs ends the response.
          logprobs: the number of most likely tokens with log-probabilities; None for the setting
            of the config.
          controls: the other settings and constraints of this row [1, ...]. They may include
            temperature, top_p and max_new_tokens if these are not passed as arguments.
          conversation: the cached conversation that the prompt continues, so that only its new
            tokens are encoded; the response is equal up to the order of float sums. It requires
            `prefill_together=1`.
          watch: whether every denoise step runs as a separate program and produces a
            `DenoiseStep`. During one such step, other requests decode a whole block.

        Raises:
          ValueError: if a call of the sampler would raise it, or if the request does not fit into a
            slot, sets a number twice, has stop texts without a tokenizer, or has a conversation
            that does not match the engine.
        """
        controls = Controls() if controls is None else controls
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f'stop must be a list of texts that are not empty, got {stop!r}.')
        if stop and self._tokenizer is None:
            raise ValueError('stop texts need an engine with a tokenizer.')
        numbers = {'temperature': temperature, 'top_p': top_p, 'max_new_tokens': max_new_tokens}
        for name, number in numbers.items():
            if number is not None and getattr(controls, name) is not None:
                raise ValueError(f'Set {name}={number} or controls.{name}, not both.')
        sampler = self._sampler(mode, temperature, logprobs)
        if watch:
            check_has_canvas(sampler)
        if temperature:
            row_temperature = np.full(1, temperature, np.float32)
            controls = dataclasses.replace(controls, temperature=row_temperature)
        if top_p is not None:
            dataclasses.replace(sampler.config, top_p=top_p)  # raises if it is out of range
            if sampler.config.temperature > 0:  # a greedy program does not use top_p
                controls = dataclasses.replace(controls, top_p=np.full(1, top_p, np.float32))
        limit = self._limit(prompt, max_new_tokens, controls)
        controls = dataclasses.replace(controls, max_new_tokens=np.full(1, limit, np.int32))
        key = typed_key(jax.random.key(rng) if isinstance(rng, int) else rng).reshape(1)
        # The check is that of a call whose max_new_tokens is the limit of this request.
        config = dataclasses.replace(sampler.config, max_new_tokens=max(limit, 1))
        tokens = np.asarray(prompt).reshape(1, -1)
        limited = dataclasses.replace(sampler, config=config)
        limited.checked(tokens, np.array([len(prompt)]), key, controls)
        if conversation is not None:
            self._check(conversation)
        controls = _widened(controls, self.sampler.config.max_new_tokens)
        entry = Entry(list(prompt), key, controls, conversation)
        request = Request(next(self._ids), entry, tuple(stop), limit)
        self._group(sampler, controls, watch).waiting.append(request)
        return request.id

    def step(self, *, until_one_finishes: bool = False) -> list[Event]:
        """Fills free slots, decodes one block of every row and returns the events.

        Watched rows only run one denoise step, or, after the last one, complete their block.

        Args:
          until_one_finishes: whether each group runs blocks in one program until one of its rows
            has finished, with fewer waits for the device but later events. It does not affect
            watched rows.
        """
        events: list[Event] = []
        for group in self._refillable():
            events += group.guarded(group.fill)
        for group in list(self._groups.values()):
            if group.running:
                events += group.guarded(functools.partial(group.advance, until_one_finishes))
        return events

    def run(self, *, until_one_finishes: bool = False) -> Iterator[Event]:
        """Runs steps and yields their events until every request is answered."""
        while self.waiting or self.running:
            yield from self.step(until_one_finishes=until_one_finishes)

    def cancel(self, id: int) -> bool:
        """Drops a request, so no more events follow; returns False if the number is unknown."""
        return any(group.cancel(id) for group in self._groups.values())

    @property
    def waiting(self) -> int:
        """Returns the number of requests without a slot."""
        return sum(len(group.waiting) for group in self._groups.values())

    @property
    def running(self) -> int:
        """Returns the number of requests in slots."""
        return sum(len(group.running) for group in self._groups.values())

    def _sampler(
        self, mode: str | None, temperature: float | None, logprobs: int | None
    ) -> Sampler:
        """Returns the sampler of a request; temperature 0 becomes a constant of its program."""
        sampler = self.sampler
        if mode is not None:
            sampler = dataclasses.replace(sampler, mode=mode)
        if logprobs is not None:
            config = dataclasses.replace(sampler.config, logprobs=logprobs)
            sampler = dataclasses.replace(sampler, config=config)
        if temperature is not None:
            # Other temperatures come from the controls of the row, so they share one program.
            static = 0.0 if temperature == 0 else 1.0
            config = dataclasses.replace(sampler.config, temperature=static)
            sampler = dataclasses.replace(sampler, config=config)
        return sampler

    def _check(self, conversation: ConversationCache) -> None:
        if self._together > 1:
            raise ValueError(
                'A conversation needs prompts that are encoded one by one; make the engine '
                f'without prefill_together={self._together}.'
            )
        if conversation.capacity != self.capacity:
            raise ValueError(
                f'The conversation has room for {conversation.capacity} tokens and the engine for '
                f"{self.capacity}; create it with the engine's capacity."
            )

    def _limit(self, prompt: Sequence[int], limit: int | None, controls: Controls) -> int:
        """Returns the maximum length of a response; raises ValueError if it does not fit."""
        room, most = self.capacity - len(prompt), self.sampler.config.max_new_tokens
        if not len(prompt):
            raise ValueError('The prompt is empty; a prompt holds at least the bos token.')
        if controls.max_new_tokens is not None:
            limit = int(np.asarray(controls.max_new_tokens).reshape(()))
        if limit is None and room >= 1:
            return min(most, room)
        if limit is None:
            raise ValueError(
                f'The prompt has {len(prompt)} tokens, which leaves no room for a response in the '
                f'capacity of {self.capacity}. Shorten the prompt.'
            )
        if not 0 <= limit <= most:
            raise ValueError(f'max_new_tokens must lie in [0, {most}], got {limit}.')
        if limit > room:
            raise ValueError(
                f'The prompt has {len(prompt)} tokens, which with max_new_tokens={limit} is more '
                f'than the capacity of {self.capacity}. Shorten the prompt or lower max_new_tokens.'
            )
        return limit

    def _group(self, sampler: Sampler, controls: Controls, watch: bool) -> Group:
        """Returns the group whose program can answer a request, a new one if there is none."""
        shared = (controls.allowed_sets, controls.automaton)
        rows = dataclasses.replace(controls, allowed_sets=None, automaton=None)
        leaves, structure = jax.tree.flatten(rows)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (sampler, watch, structure, shapes, *map(id, shared))
        if key not in self._groups:
            # Groups without requests and without a K/V cache are dropped.
            groups = self._groups.items()
            self._groups = {k: g for k, g in groups if g.waiting or g.slots.allocated}
            kind = WatchedGroup if watch else Group
            self._groups[key] = kind(self._new_slots(sampler), self._tokenizer, shared)
        return self._groups[key]

    def _refillable(self) -> Iterator[Group]:
        """Yields the groups with waiting requests that have a K/V cache or may allocate one.

        Groups are ordered by their oldest waiting request. If a group cannot get a cache, younger
        requests are not served before it, so that the groups with a cache become idle.
        """
        waiting = [group for group in self._groups.values() if group.waiting]
        for group in sorted(waiting, key=lambda group: group.waiting[0].id):
            if not group.slots.allocated and not self._make_room():
                return
            yield group

    def _make_room(self) -> bool:
        """Returns whether one more group may allocate a K/V cache; releases an idle one."""
        allocated = [group for group in self._groups.values() if group.slots.allocated]
        if len(allocated) < self._max_groups:
            return True
        idle = [group for group in allocated if not group.running]
        if not idle:
            return False
        idle[0].release()
        return True


def _widened(controls: Controls, width: int) -> Controls:
    """Returns the controls with tables of `width` positions, the same in all requests."""

    def widen(table: AnyArray | None) -> np.ndarray | None:
        if table is None:
            return None
        positions = np.asarray(table, np.int32)[:, :width]
        missing = width - positions.shape[1]
        return np.pad(positions, ((0, 0), (0, missing)), constant_values=OPEN)

    return dataclasses.replace(
        controls,
        pinned=widen(controls.pinned),
        seed=widen(controls.seed),
        allowed_index=widen(controls.allowed_index),
    )
