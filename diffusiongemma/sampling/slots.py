"""A batch with a fixed number of rows, the slots, that start and end independently."""

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
    """The input of one row.

    Attributes:
      prompt: the token ids of the prompt, at least one.
      key: the typed random key of the row, [1].
      controls: the controls of the row; all slots share its allowed sets and its automaton.
      conversation: the cached conversation that the prompt continues, or None.
    """

    prompt: Sequence[int]
    key: jax.Array
    controls: Controls
    conversation: ConversationCache | None = None


class Slots:
    """A generation state of fixed shape in which rows are replaced.

    The tokens of a row only depend on its entry. If prompts are prefilled one by one
    (`together` = 1), other rows do not change the programs that compute them.

    Attributes:
      sampler: the sampler of all rows.
      size: the number of rows.
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
        """Creates the slots; nothing is allocated before the first entry.

        Args:
          sampler: a sampler in any mode.
          params: the parameters of the model.
          slots: the number of rows.
          capacity: the maximum number of tokens of a prompt and its response.
          multiple: a prompt is padded to this length times a power of two, at most the capacity,
            so that few shapes are compiled.
          together: the maximum number of prompts of a prefill pass; it must be 1 with prefixes or
            conversations.
          prefixes: the cache of shared prompt prefixes, or None.
        """
        self.sampler, self._params = sampler, params
        self._bound = (sampler.model, sampler.config, params)
        self.size, self._capacity = slots, capacity
        self._multiple, self._together, self._prefixes = multiple, together, prefixes
        self._state: State | None = None

    @property
    def allocated(self) -> bool:
        """Returns whether the slots have a K/V cache."""
        return self._state is not None

    def release(self) -> None:
        """Frees the memory and drops the rows in the slots."""
        self._state = None

    def insert(self, entries: Sequence[Entry], slots: Sequence[int]) -> None:
        """Prefills entries and replaces the rows in the given slots by them."""
        for first in range(0, len(entries), self._together):
            part = slice(first, first + self._together)
            self._insert(list(entries[part]), list(slots[part]))

    def _insert(self, entries: list[Entry], slots: list[int]) -> None:
        extra = 2 ** int(np.ceil(np.log2(len(entries)))) - len(entries)
        entries = entries + entries[:1] * extra  # pads to a power of two, to compile few shapes
        slots = slots + [self.size] * extra  # not a slot, so these rows are dropped
        keys = jnp.concatenate([entry.key for entry in entries])
        controls = _stacked([entry.controls for entry in entries])
        prompts = [entry.prompt for entry in entries]
        conversation, (cache, cached) = entries[0].conversation, (None, 0)
        source = self._prefixes if conversation is None else conversation
        if source is not None:
            cache, cached = source.before(prompts[0])
        padded = self._padded([prompt[cached:] for prompt in prompts])
        arguments: tuple[object, ...] = (*padded, keys, controls)
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
        """Returns tokens [rows, width] and lengths [rows]; the default is a `padded_width`."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = width or padded_width(int(lengths.max()), self._multiple, self._capacity)
        tokens = np.full((len(prompts), width), self.sampler.config.pad_id, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        return tokens, lengths

    def advance(self) -> None:
        """Decodes one block of every unfinished row."""
        self._state = MODES[self.sampler.mode].advance(*self._bound, self._state)

    def steps(self) -> Iterator[Draft]:
        """Decodes one block and yields its steps; no other method may change rows meanwhile."""
        assert self._state is not None  # a row is running
        self._state = yield from block_by_steps(self.sampler, self._params, self._state)

    def until_one_finishes(self) -> None:
        """Decodes blocks in one compiled program until another row has finished."""
        self._state = MODES[self.sampler.mode].until_one_finishes(*self._bound, self._state)

    def stop(self, slots: Sequence[int]) -> None:
        """Marks rows as finished, so that later blocks skip them."""
        rows = np.isin(np.arange(self.size), list(slots))
        self._state = _stop(self._state, rows)

    def keep(self, slot: int, entry: Entry, response: Sequence[int]) -> None:
        """Adds the K/V cache of a finished row to its conversation, if it has one."""
        if entry.conversation is not None:
            assert self._state is not None  # it contains the row
            entry.conversation.keep([*entry.prompt, *response], _row(self._state.cache, slot))

    def read(self) -> tuple[SamplerOutput, np.ndarray]:
        """Returns the responses so far as numpy arrays, and which rows finished, [slots] bool."""
        assert self._state is not None  # a row is running
        latest = (self._state.output(), self._state.finished)
        output, finished = jax.device_get(latest)
        return output, finished


def _stacked(controls: Sequence[Controls]) -> Controls:
    """Concatenates the controls of single rows."""
    first, *others = controls
    return first.map_rows(lambda *rows: np.concatenate(rows), *others)


@functools.partial(jax.jit, static_argnames='slots')
def _blank(new: State, slots: int) -> State:
    """Returns a state of finished rows with the row shapes of `new`.

    The allowed sets and the automaton are copied: programs donate the buffers of the state, but
    the caller continues to use the originals.
    """
    first = jnp.zeros(slots, jnp.int32)

    def repeat(leaf: jax.Array) -> jax.Array:
        return leaf[first]  # [slots, ...]

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
    """Returns a copy of one row of the cache."""

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
    """Returns the `GenerationState` within the state of any mode."""
    return state.generation if isinstance(state, LosslessState) else state
