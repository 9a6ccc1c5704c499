"""A batch of few rows, the slots, whose rows start and end apart from each other."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafter import LosslessState
from diffusiongemma.sampling.prefixes import ConversationCache, PrefixCache, padded_width
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.sampler import MODES, OneState, Sampler, State
from diffusiongemma.sampling.state import GenerationState, SamplerOutput
from diffusiongemma.sampling.watch import Draft, block_by_steps


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a slot starts with.

    Attributes:
      prompt: token ids, at least one.
      key: [1] typed random key of the row.
      controls: of one row; the sets and the automaton in it are those of all slots.
      conversation: what the prompt goes on from, and what is kept of it; None for neither.
    """

    prompt: Sequence[int]
    key: jax.Array
    controls: Controls
    conversation: ConversationCache | None = None


class Slots:
    """A generation state of fixed shape in which rows are replaced.

    A row's tokens depend on its entry alone. With prompts prefilled one by one (`together` = 1)
    the programs that compute them are the same ones whatever else is there.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        *,
        slots: int,
        capacity: int,
        multiple: int,
        together: int,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Allocates nothing before the first entry.

        Args:
          sampler: any mode.
          params: the model's parameters.
          slots: rows.
          capacity: tokens of a prompt and its response.
          multiple: a prompt is padded to this number times a power of two, at most the capacity,
            so that few shapes compile.
          together: how many prompts one prefill pass may take; 1 with prefixes or conversations.
          prefixes: encodes the beginnings of prompts, and keeps some; None for neither.
        """
        self.sampler, self._params = sampler, params
        self._bound = (sampler.model, sampler.config, params)
        self.size, self._capacity = slots, capacity
        self._multiple, self._together, self._prefixes = multiple, together, prefixes
        self._state: State | None = None

    @property
    def allocated(self) -> bool:
        """Whether there is a K/V cache."""
        return self._state is not None

    def release(self) -> None:
        """Gives the memory back; what was in the slots is lost."""
        self._state = None

    def insert(self, entries: Sequence[Entry], slots: Sequence[int]) -> None:
        """Puts entries, at the beginning of their responses, in the place of some rows."""
        for first in range(0, len(entries), self._together):
            some = slice(first, first + self._together)
            self._insert(list(entries[some]), list(slots[some]))

    def _insert(self, entries: list[Entry], slots: list[int]) -> None:
        extra = 2 ** int(np.ceil(np.log2(len(entries)))) - len(entries)
        entries = entries + entries[:1] * extra  # as many as a power of two: few shapes compile
        slots = slots + [self.size] * extra  # which is no slot
        keys = jnp.concatenate([entry.key for entry in entries])
        controls = _stacked([entry.controls for entry in entries])
        prompts = [entry.prompt for entry in entries]
        conversation, (cache, done) = entries[0].conversation, (None, 0)
        before = self._prefixes if conversation is None else conversation
        if before is not None:
            cache, done = before.before(prompts[0])
        arguments: tuple = (*self._padded([prompt[done:] for prompt in prompts]), keys, controls)
        whole = None
        if cache is not None:
            arguments, whole = (*arguments, cache), self._padded(prompts, self._capacity)
        start = MODES[self.sampler.mode].start
        new = start(*self._bound, *arguments, whole=whole, capacity=self._capacity)
        if conversation is not None:
            conversation.keep(prompts[0], new.cache)
        if self._state is None:
            self._state = _blank(new, self.size)
        self._state = _put(self._state, new, jnp.asarray(slots))

    def _padded(
        self, prompts: Sequence[Sequence[int]], width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [rows, width] and lengths [rows]; a width that few prompts differ in, or this."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = width or padded_width(int(lengths.max()), self._multiple, self._capacity)
        tokens = np.full((len(prompts), width), self.sampler.config.pad_id, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        return tokens, lengths

    def advance(self) -> None:
        """One more block of every unfinished row."""
        self._state = MODES[self.sampler.mode].advance(*self._bound, self._state)

    def steps(self) -> Iterator[Draft]:
        """One more block step by step; until its end nothing else may change the rows."""
        assert self._state is not None  # rows run
        self._state = yield from block_by_steps(self.sampler, self._params, self._state)

    def until_one_finishes(self) -> None:
        """Blocks until another row is finished, in one compiled program."""
        self._state = MODES[self.sampler.mode].until_one_finishes(*self._bound, self._state)

    def stop(self, slots: Sequence[int]) -> None:
        """Ends rows where they are, so that they cost nothing more."""
        rows = np.isin(np.arange(self.size), list(slots))
        self._state = _stop(self._state, rows)

    def keep(self, slot: int, entry: Entry, response: Sequence[int]) -> None:
        """Leaves the text of a row that is finished in its conversation, if it is of one."""
        if entry.conversation is not None:
            assert self._state is not None  # the row is in it
            entry.conversation.keep([*entry.prompt, *response], _row(self._state.cache, slot))

    def read(self) -> tuple[SamplerOutput, np.ndarray]:
        """The responses so far as numpy arrays, and which rows are finished [slots] bool."""
        assert self._state is not None  # rows run
        return jax.device_get((self._state.output(), self._state.finished))


def _stacked(controls: Sequence[Controls]) -> Controls:
    """Controls of several rows out of those of one row each."""
    first, *others = controls
    return first.map_rows(lambda *rows: np.concatenate(rows), *others)


@functools.partial(jax.jit, static_argnames='slots')
def _blank(new: State, slots: int) -> State:
    """Finished rows of the shapes of another state's.

    The sets and the automaton are copied: the state is donated from program to program, and
    whoever asked for them keeps them.
    """
    first = jnp.zeros(slots, jnp.int32)

    def repeat(leaf: jax.Array) -> jax.Array:
        return leaf[first]

    def repeat_kv(leaf: jax.Array) -> jax.Array:
        return jnp.zeros((*leaf.shape[:-4], slots, *leaf.shape[-3:]), leaf.dtype)

    generation = _generation(new)
    cache = generation.cache
    cache = KVCache(kv=jax.tree.map(repeat_kv, cache.kv), lengths=repeat(cache.lengths))
    controls = generation.controls.map_rows(repeat)
    controls = dataclasses.replace(
        controls,
        allowed_sets=jax.tree.map(jnp.copy, controls.allowed_sets),
        automaton=jax.tree.map(jnp.copy, controls.automaton),
    )
    finished = jnp.ones(slots, bool)
    generation = map_but(repeat, generation, cache=cache, controls=controls, finished=finished)
    if isinstance(new, LosslessState):
        return map_but(repeat, new, generation=generation)
    return generation


@functools.partial(jax.jit, donate_argnums=0)
def _put(state: OneState, new: OneState, slots: jax.Array) -> OneState:
    return state.insert(new, slots)


@jax.jit
def _row(cache: KVCache, row: int) -> KVCache:
    """A copy of one row."""

    def take_kv(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis=leaf.ndim - 4)

    lengths = jax.lax.dynamic_slice_in_dim(cache.lengths, row, 1)
    return KVCache(kv=jax.tree.map(take_kv, cache.kv), lengths=lengths)


@functools.partial(jax.jit, donate_argnums=0)
def _stop(state: State, rows: jax.Array) -> State:
    generation = _generation(state)
    generation = dataclasses.replace(generation, finished=generation.finished | rows)
    if isinstance(state, LosslessState):
        return dataclasses.replace(state, generation=generation)
    return generation


def _generation(state: State) -> GenerationState:
    """The `GenerationState` of a mode's state."""
    return state.generation if isinstance(state, LosslessState) else state
