"""Requests that come at any time, answered side by side in a fixed number of rows.

submit -> while requests are there { step: fill free slots -> one block of every row -> events }.
A block is a canvas, a token or a verified draft; between blocks rows are refilled and cancelled.
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
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.controls import OPEN, Controls
from diffusiongemma.sampling.events import Delta, DenoiseStep, Event, Failed, Finished, Result
from diffusiongemma.sampling.groups import Group, Request, WatchedGroup
from diffusiongemma.sampling.prefixes import ConversationCache, PrefixCache
from diffusiongemma.sampling.randomness import typed_key
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.slots import Entry, Slots
from diffusiongemma.sampling.text import check_stops
from diffusiongemma.sampling.watch import check_has_canvas

__all__ = ['Delta', 'DenoiseStep', 'Engine', 'Event', 'Failed', 'Finished', 'Result']

_DEFAULT_CAPACITY = 4096


class Engine:
    """Answers requests of every mode, side by side.

        engine = Engine(sampler, params, tokenizer, slots=8)
        ids = [engine.submit(tokenizer.format_prompt(text), rng=7) for text in texts]
        results = {e.id: e.result for e in engine.run() if isinstance(e, Finished)}

    A response depends on its request alone: on the prompt, the key, the mode and the controls, not
    on what else is asked, when, or in which order. Requests whose programs differ are answered in
    groups, each of which has slots and a K/V cache of its own: by mode, by whether they are greedy
    or watched, and by which controls they have. Those with an automaton or with allowed sets share
    a group where these are the same object.

    It is for one thread.

    Attributes:
      sampler: what a request does not say otherwise.
      capacity: most tokens of a prompt and its response.
      slots: rows of a group.
      prefixes: what is kept of prompts, or None.
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
          prefixes: K/V caches, of one row each, that are kept of what prompts begin with alike, so
            that it is encoded once. Prompts longer than `prefix_block` are then encoded block by
            block, whether anything is kept or not, and responses are the same in both cases. Not
            with `prefill_together`.
          prefix_block: tokens of a block.

        Raises:
          ValueError: a number is out of range, or the sampler would not stop at the tokenizer's
            end of turn.
        """
        positions = passes.max_positions(sampler.model)
        self.capacity = capacity or min(positions or _DEFAULT_CAPACITY, _DEFAULT_CAPACITY)
        numbers = {
            'slots': slots, 'capacity': self.capacity, 'multiple': multiple,
            'max_groups': max_groups, 'prefill_together': prefill_together,
            'prefix_block': prefix_block,
        }  # fmt: skip
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f'{name} must be >= 1, got {number}.')
        if prefixes and prefill_together > 1:
            raise ValueError(
                f'prefixes={prefixes} are for prompts that are encoded one by one; leave '
                f'prefill_together={prefill_together} out.'
            )
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
          prompt: token ids.
          rng: a key, or the number of one.
          mode: in place of the sampler's.
          temperature, top_p: in place of the config's.
          max_new_tokens: longest response; None for the config's, or less where the slot has no
            room for so many.
          stop: texts of which the first to come ends the response.
          logprobs: in place of the config's.
          controls: the other settings and constraints, of one row [1, ...]; it may hold the three
            numbers too, where they are not given above.
          conversation: what the prompt goes on from, so that only what is new is encoded; the
            response is the same up to the order of float sums. Not with `prefill_together`.
          watch: shows every denoise step, each a program of its own, in a `DenoiseStep`. Other
            requests take a block while this one takes a step.

        Raises:
          ValueError: as a call of the sampler; or the request does not fit into a slot, or says a
            number twice, or names stop texts to an engine without a tokenizer, or a conversation
            that the engine cannot go on from.
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
        sampler = self._sampler(mode, temperature, logprobs)
        if watch:
            check_has_canvas(sampler)
        if temperature:
            drawn = np.full(1, temperature, np.float32)
            controls = dataclasses.replace(controls, temperature=drawn)
        if top_p is not None and sampler.config.temperature > 0:
            controls = dataclasses.replace(controls, top_p=np.full(1, top_p, np.float32))
        limit = self._limit(prompt, max_new_tokens, controls)
        controls = dataclasses.replace(controls, max_new_tokens=np.full(1, limit, np.int32))
        key = typed_key(jax.random.key(rng) if isinstance(rng, int) else rng).reshape(1)
        # Checked as a call that has no more room than this request takes.
        config = dataclasses.replace(sampler.config, max_new_tokens=max(limit, 1))
        tokens = np.asarray(prompt).reshape(1, -1)
        narrow = dataclasses.replace(sampler, config=config)
        narrow.checked(tokens, np.array([len(prompt)]), key, controls)
        if conversation is not None:
            self._check(conversation)
        controls = _widened(controls, self.sampler.config.max_new_tokens)
        entry = Entry(list(prompt), key, controls, conversation)
        request = Request(next(self._ids), entry, tuple(stop), limit)
        self._group(sampler, controls, watch).waiting.append(request)
        return request.id

    def step(self, *, until_one_finishes: bool = False) -> list[Event]:
        """Fills free slots, takes one block of every row, and says what came of it.

        Of rows that are watched it takes one denoise step, or after the last one what ends a block.

        Args:
          until_one_finishes: takes as many blocks in one program as it needs until a row of each
            group is finished: fewer waits for the device, and later news. Not of watched rows.
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

    def _sampler(
        self, mode: str | None, temperature: float | None, logprobs: int | None
    ) -> Sampler:
        """The sampler of a request; a greedy one is known to be so when it is compiled."""
        sampler = self.sampler
        if mode is not None:
            sampler = dataclasses.replace(sampler, mode=mode)
        if logprobs is not None:
            config = dataclasses.replace(sampler.config, logprobs=logprobs)
            sampler = dataclasses.replace(sampler, config=config)
        if temperature is not None:
            # Of another temperature than 0 the row's number counts, and one program serves all.
            known = 0.0 if temperature == 0 else 1.0
            config = dataclasses.replace(sampler.config, temperature=known)
            sampler = dataclasses.replace(sampler, config=config)
        return sampler

    def _check(self, conversation: ConversationCache) -> None:
        if self._together > 1:
            raise ValueError(
                'A conversation is for prompts that are encoded one by one; make the engine '
                f'without prefill_together={self._together}.'
            )
        if conversation.capacity != self.capacity:
            raise ValueError(
                f'The conversation has room for {conversation.capacity} tokens and the engine for '
                f"{self.capacity}; make it with the engine's capacity."
            )

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

    def _group(self, sampler: Sampler, controls: Controls, watch: bool) -> Group:
        shared = (controls.allowed_sets, controls.automaton)
        rows = dataclasses.replace(controls, allowed_sets=None, automaton=None)
        leaves, structure = jax.tree.flatten(rows)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        name = (sampler, watch, structure, shapes, *map(id, shared))
        if name not in self._groups:
            used = {n: g for n, g in self._groups.items() if g.waiting or g.slots.allocated}
            self._groups = used
            kind = WatchedGroup if watch else Group
            self._groups[name] = kind(self._new_slots(sampler), self._tokenizer, shared)
        return self._groups[name]

    def _refillable(self) -> Iterator[Group]:
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
        idle[0].release()
        return True


def _widened(controls: Controls, width: int) -> Controls:
    """The same controls with the same number of positions in all requests."""

    def widen(table: AnyArray | None) -> np.ndarray | None:
        if table is None:
            return None
        kept = np.asarray(table, np.int32)[:, :width]
        return np.pad(kept, ((0, 0), (0, width - kept.shape[1])), constant_values=OPEN)

    return dataclasses.replace(
        controls,
        pinned=widen(controls.pinned),
        seed=widen(controls.seed),
        allowed_index=widen(controls.allowed_index),
    )
