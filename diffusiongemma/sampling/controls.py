"""What a call asks of each row beyond its prompt: arrays of static shape, so that nothing compiles
anew when their values change.

Positions count from the start of the response: position 0 is its first token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from diffusiongemma.constraints.automaton import START, TokenAutomaton
from diffusiongemma.models.arrays import AnyArray, Array
from diffusiongemma.sampling.rows import map_but

OPEN = -1  # a position without a pinned token, a seed or a set


@flax.struct.dataclass
class Controls:
    """Settings and constraints of the rows of a batch; what is None asks for nothing.

    They hold in every mode: where a token is not allowed, the autoregressive distribution is
    that of the others, and lossless mode equals it.

    Attributes:
      temperature: [B] float32 >= 0 in place of the config's; 0 is greedy.
      top_p: [B] float32 in (0, 1] in place of the config's; 1 keeps all tokens.
      max_new_tokens: [B] int32, at most the config's; 0 gives an empty response.
      pinned: [B, T] int32, the token that a position holds, `OPEN` (-1) where it is open. Text
        between a prefix and a suffix is filled in by pinning the suffix.
      seed: [B, T] int32, tokens that a canvas starts from, -1 where it starts from noise. They
        can change; of no effect in the autoregressive mode.
      allowed_sets: [G, V] bool, sets of allowed tokens.
      allowed_index: [B, T] int32, which set holds at a position, -1 for none. None: the first
        set holds everywhere.
      automaton: of all valid responses, see `grammar`. Every canvas is drawn from those that a
        valid response can start with. Pinned tokens and sets can leave a row without a valid
        response, which is then as good as unconstrained.
      automaton_states: [B] int32, each row's state before its response; `automaton.FREE` for a
        row without constraint. None: START for all.
    """

    temperature: Float[AnyArray, ' B'] | None = None
    top_p: Float[AnyArray, ' B'] | None = None
    max_new_tokens: Int[AnyArray, ' B'] | None = None
    pinned: Int[AnyArray, 'B _'] | None = None  # tables may differ in their width T
    seed: Int[AnyArray, 'B _'] | None = None
    allowed_sets: Bool[AnyArray, 'G V'] | None = None
    allowed_index: Int[AnyArray, 'B _'] | None = None
    automaton: TokenAutomaton | None = None
    automaton_states: Int[AnyArray, ' B'] | None = None

    def pinned_at(self, offsets: Int[Array, ' B'], length: int) -> Int[Array, 'B C'] | None:
        """Pinned tokens [B, length] from position offsets [B] on, or None."""
        return None if self.pinned is None else _slice(self.pinned, offsets, length)

    def seed_at(self, offsets: Int[Array, ' B'], length: int) -> Int[Array, 'B C'] | None:
        """Seed tokens [B, length] from position offsets [B] on, or None."""
        return None if self.seed is None else _slice(self.seed, offsets, length)

    def allowed_at(self, offsets: Int[Array, ' B'], length: int) -> Bool[Array, '#B #C V'] | None:
        """Allowed tokens from position offsets [B] on, [B or 1, length or 1, V] bool, or None."""
        if self.allowed_sets is None:
            return None
        sets = jnp.asarray(self.allowed_sets)
        if self.allowed_index is None:
            return sets[:1, None]
        index = _slice(self.allowed_index, offsets, length)
        sets = sets[jnp.maximum(index, 0)]  # [B, length, V]
        return sets | (index == OPEN)[..., None]

    def start_states(self, batch_size: int) -> Int[Array, ' {batch_size}'] | None:
        """The automaton's state before each response, [B] int32, or None."""
        if self.automaton is None or self.automaton_states is not None:
            return traced(self.automaton_states)
        return jnp.full((batch_size,), START, jnp.int32)

    def map_rows(self, function: Callable[..., AnyArray], *others: 'Controls') -> 'Controls':
        """Maps what belongs to rows; the sets and the automaton of the batch stay."""
        shared = {'allowed_sets': self.allowed_sets, 'automaton': self.automaton}
        return map_but(function, self, *others, **shared)

    def check(self, batch_size: int, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ValueError on unfit shapes, and on unfit values where they are known."""
        rows = {
            'temperature': self.temperature,
            'top_p': self.top_p,
            'max_new_tokens': self.max_new_tokens,
            'automaton_states': self.automaton_states,
        }
        positions = {
            'pinned': self.pinned,
            'seed': self.seed,
            'allowed_index': self.allowed_index,
        }
        for name, array in rows.items():
            if array is not None and np.shape(array) != (batch_size,):
                raise ValueError(
                    f'controls.{name} must hold one number per row, ({batch_size},), got shape '
                    f'{np.shape(array)}.'
                )
        for name, array in positions.items():
            shape = () if array is None else np.shape(array)
            if array is not None and (len(shape) != 2 or shape[0] != batch_size):
                raise ValueError(
                    f'controls.{name} must be [{batch_size}, positions], got shape {shape}.'
                )
        sets = () if self.allowed_sets is None else np.shape(self.allowed_sets)
        if self.allowed_sets is not None and (len(sets) != 2 or sets[1] != vocab_size):
            raise ValueError(
                f'controls.allowed_sets must be [sets, {vocab_size}] bool, got shape {sets}.'
            )
        if self.allowed_sets is None and self.allowed_index is not None:
            raise ValueError('controls.allowed_index needs allowed_sets, the sets that it names.')
        if self.automaton is None and self.automaton_states is not None:
            raise ValueError('controls.automaton_states needs the automaton that they are of.')
        if self.automaton is not None and self.automaton.vocab_size != vocab_size:
            raise ValueError(
                f'controls.automaton is of {self.automaton.vocab_size} tokens and the model of '
                f"{vocab_size}; compile it with vocab_size set to the model's."
            )
        if all(is_known(array) for array in jax.tree.leaves(self)):
            self._check_values(vocab_size, max_new_tokens)

    def _check_values(self, vocab_size: int, max_new_tokens: int) -> None:
        _check_range('temperature', self.temperature, 0, np.finfo(np.float32).max)
        _check_range('top_p', self.top_p, np.finfo(np.float32).tiny, 1)
        _check_range('max_new_tokens', self.max_new_tokens, 0, max_new_tokens)
        _check_range('pinned', self.pinned, OPEN, vocab_size - 1)
        _check_range('seed', self.seed, OPEN, vocab_size - 1)
        if self.automaton is not None:
            self._check_automaton(self.automaton, max_new_tokens)
        if self.allowed_sets is None:
            return
        sets = np.asarray(self.allowed_sets)
        _check_range('allowed_index', self.allowed_index, OPEN, len(sets) - 1)
        index = self.allowed_index
        used = np.zeros((1, 1), int) if index is None else np.asarray(index)
        is_empty = ~np.asarray(sets.any(axis=-1))  # [G]
        empty = np.argwhere((used >= 0) & is_empty[used])
        if empty.size:
            row, position = empty[0]
            raise ValueError(
                f'controls.allowed_sets bans every token at position {position} of row {row} (set '
                f'{used[row, position]} is empty). Allow at least one token.'
            )
        if self.pinned is not None:
            self._check_pinned(np.asarray(self.pinned), used, sets)

    def _check_automaton(self, automaton: TokenAutomaton, max_new_tokens: int) -> None:
        distances = np.asarray(automaton.distances)
        _check_range('automaton_states', self.automaton_states, 0, len(distances) - 1)
        states = START if self.automaton_states is None else np.asarray(self.automaton_states)
        limits = max_new_tokens if self.max_new_tokens is None else np.asarray(self.max_new_tokens)
        short = np.atleast_1d((distances[states] > limits) & (np.asarray(limits) > 0))
        if short.any():
            row = int(np.argmax(short))
            raise ValueError(
                f'The shortest valid response of row {row} has '
                f'{np.broadcast_to(distances[states], short.shape)[row]} tokens, more than its '
                f'limit of {np.broadcast_to(limits, short.shape)[row]}. Raise max_new_tokens.'
            )

    def _check_pinned(self, pinned: np.ndarray, used: np.ndarray, sets: np.ndarray) -> None:
        width = max(pinned.shape[1], used.shape[1]) if self.allowed_index is not None else 0
        index = np.zeros_like(pinned)
        if width:
            index = np.full((len(pinned), width), OPEN)
            index[:, : used.shape[1]] = used
            index = index[:, : pinned.shape[1]]
        banned = (pinned != OPEN) & (index != OPEN) & ~sets[index, pinned]
        if banned.any():
            row, position = np.argwhere(banned)[0]
            raise ValueError(
                f'controls pin token {pinned[row, position]} at position {position} of row {row}, '
                'where allowed_sets bans it.'
            )


def restrict(
    logits: Float[Array, 'B T V'],
    pinned: Int[Array, 'B T'] | None,
    allowed: Bool[Array, '#B #T V'] | None,
) -> Float[Array, 'B T V']:
    """Logits with every token that may not be there at -inf.

    Where nothing at all would be left (a set that bans everything, which `Controls.check`
    refuses where it can read the values), the set is ignored.

    Args:
      logits: [B, T, V] float32.
      pinned: [B, T] int32, or None.
      allowed: bool that broadcasts to [B, T, V], or None.
    """
    tokens = jnp.arange(logits.shape[-1])
    if allowed is not None:
        logits = jnp.where(allowed | ~jnp.any(allowed, -1, keepdims=True), logits, -jnp.inf)
    if pinned is not None:
        # The pinned token may be one that the model deems impossible: it counts as certain.
        here = tokens == pinned[..., None]
        logits = jnp.where(pinned[..., None] == OPEN, logits, jnp.where(here, 0.0, -jnp.inf))
    return logits


def without_unknown(logits: Float[Array, '*B V'], vocab_size: int | None) -> Float[Array, '*B V']:
    """Returns the logits with every id that the tokenizer does not have at -inf.

    A model can have more rows than its tokenizer has tokens (Gemma 3 4B and larger: 262,208 rows
    for 262,144 tokens). Such an id stands for no text and must never be drawn.

    Args:
      logits: [..., V] float32.
      vocab_size: tokens of the tokenizer, at most V; None where it has all V.
    """
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def pin(responses: Sequence[Sequence[int | None]]) -> Int[Array, 'B T']:
    """`Controls.pinned` from one list per row: token ids, None where a position is open."""
    width = max((len(row) for row in responses), default=0)
    pinned = np.full((len(responses), max(width, 1)), OPEN, np.int32)
    for row, response in zip(pinned, responses, strict=True):
        row[: len(response)] = [OPEN if token is None else token for token in response]
    return jnp.asarray(pinned)


def allow(tokens: Sequence[int], vocab_size: int) -> Bool[Array, ' {vocab_size}']:
    """One row of `Controls.allowed_sets` [V] with these tokens alone."""
    return jnp.zeros(vocab_size, bool).at[jnp.asarray(list(tokens), jnp.int32)].set(True)


def ban(tokens: Sequence[int], vocab_size: int) -> Bool[Array, ' {vocab_size}']:
    """One row of `Controls.allowed_sets` [V] with all but these tokens."""
    return ~allow(tokens, vocab_size)


def exact_lengths(lengths: Sequence[int], stop_ids: Sequence[int], vocab_size: int) -> Controls:
    """Controls under which row r's response ends with its lengths[r]-th token, the stop token.

    Args:
      lengths: tokens of each response, its stop token included; >= 1.
      stop_ids: the config's; the first of them ends the responses.
      vocab_size: V.

    Raises:
      ValueError: when a length is < 1 or there is no stop token.
    """
    if min(lengths, default=0) < 1:
        raise ValueError(f'lengths must be >= 1, the stop token, got {list(lengths)}.')
    if not stop_ids:
        raise ValueError('A length target needs a stop token that ends the response.')
    positions = np.arange(max(lengths))
    ends = np.asarray(lengths)[:, None] - 1
    return Controls(
        pinned=jnp.asarray(np.where(positions == ends, stop_ids[0], OPEN), jnp.int32),
        allowed_sets=ban(stop_ids, vocab_size)[None],
        allowed_index=jnp.asarray(np.where(positions < ends, 0, OPEN), jnp.int32),
    )


def traced(array: AnyArray | None) -> jax.Array | None:
    """An array of controls as compiled programs read it, or None."""
    return None if array is None else jnp.asarray(array)


def is_known(array: Any) -> bool:
    """Whether the values can be read on this host."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _slice(
    table: Int[AnyArray, 'B T'], offsets: Int[Array, ' B'], length: int
) -> Int[Array, 'B {length}']:
    """[B, T] -> [B, length] from offsets [B] on, OPEN behind the end."""
    columns = offsets[:, None] + jnp.arange(length)
    return jnp.take_along_axis(table, columns, axis=1, mode='fill', fill_value=OPEN)


def _check_range(
    name: str, array: AnyArray | None, low: float | np.floating, high: float | np.floating
) -> None:
    if array is None:
        return
    values = np.asarray(array)
    bad = np.argwhere(~((values >= low) & (values <= high)))
    if bad.size:
        place = ', '.join(str(i) for i in bad[0])
        raise ValueError(
            f'controls.{name}[{place}] is {values[tuple(bad[0])]}, but must lie in [{low}, {high}].'
        )
