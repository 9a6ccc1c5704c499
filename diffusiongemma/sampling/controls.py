"""Per-row settings and constraints of a call, as arrays, so new values need no recompilation.

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

OPEN = -1  # marks a position without a pinned token, a seed or a set


@flax.struct.dataclass
class Controls:
    """The settings and constraints of the rows of a batch; None means no setting or constraint.

    They apply in every mode: the autoregressive distribution is renormalized over the allowed
    tokens, and the lossless mode follows it.

    Attributes:
      temperature: [B] float32 >= 0, overrides that of the config; 0 is greedy.
      top_p: [B] float32 in (0, 1], overrides that of the config; 1 keeps all tokens.
      max_new_tokens: [B] int32, at most that of the config; 0 gives an empty response.
      pinned: [B, T] int32, the fixed token of a position, or `OPEN` (-1). To fill in text between
        a prefix and a suffix, pin the suffix.
      seed: [B, T] int32, the initial token of a canvas position, or -1 for noise. It can change;
        it has no effect in the autoregressive mode.
      allowed_sets: [G, V] bool, sets of allowed tokens.
      allowed_index: [B, T] int32, the index of the set that applies at a position, -1 for none.
        None applies the first set to all positions.
      automaton: the automaton of all valid responses, see `constraints.grammar`. Every canvas is
        drawn such that the response, including the canvas, can become a valid one. If pinned tokens
        and sets leave a row without a valid response, the row is unconstrained.
      automaton_states: [B] int32, the state of each row before its response; `automaton.FREE` for
        a row without constraint. None means START for all rows.
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
        """Returns the pinned tokens [B, length] from position offsets [B] on, or None."""
        return None if self.pinned is None else _slice(self.pinned, offsets, length)

    def seed_at(self, offsets: Int[Array, ' B'], length: int) -> Int[Array, 'B C'] | None:
        """Returns the seed tokens [B, length] from position offsets [B] on, or None."""
        return None if self.seed is None else _slice(self.seed, offsets, length)

    def allowed_at(self, offsets: Int[Array, ' B'], length: int) -> Bool[Array, '#B #C V'] | None:
        """Returns allowed tokens from position offsets [B] on, or None.

        Their shape is [B or 1, length or 1, V] bool.
        """
        if self.allowed_sets is None:
            return None
        sets = jnp.asarray(self.allowed_sets)
        if self.allowed_index is None:
            return sets[:1, None]  # [1, 1, V]
        index = _slice(self.allowed_index, offsets, length)  # [B, length]
        sets = sets[jnp.maximum(index, 0)]  # [B, length, V]
        return sets | (index == OPEN)[..., None]

    def start_states(self, batch_size: int) -> Int[Array, ' {batch_size}'] | None:
        """Returns the automaton's state before each response, [B] int32, or None."""
        if self.automaton is None or self.automaton_states is not None:
            return traced(self.automaton_states)
        return jnp.full((batch_size,), START, jnp.int32)

    def map_rows(self, function: Callable[..., AnyArray], *others: 'Controls') -> 'Controls':
        """Returns the controls with a function applied to the arrays that have one entry per row.

        The allowed sets and the automaton, which all rows share, are unchanged.
        """
        shared = {'allowed_sets': self.allowed_sets, 'automaton': self.automaton}
        return map_but(function, self, *others, **shared)

    def check(self, batch_size: int, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ValueError on invalid shapes, and on invalid values outside of traced code."""
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
        floats = {'temperature', 'top_p'}
        for name, array in (rows | positions).items():
            if array is None or name in floats or is_integer(array):
                continue
            raise ValueError(
                f'controls.{name} must hold whole numbers, got {jnp.result_type(array)}.'
            )
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
            raise ValueError('controls.allowed_index needs allowed_sets, which it indexes.')
        if self.automaton is None and self.automaton_states is not None:
            raise ValueError('controls.automaton_states needs the automaton of these states.')
        if self.automaton is not None and self.automaton.vocab_size != vocab_size:
            raise ValueError(
                f'controls.automaton has {self.automaton.vocab_size} tokens and the model has '
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
    """Returns the logits with -inf for all tokens that are not allowed.

    A set that bans every token is ignored (`Controls.check` refuses it if it can read the values).

    Args:
      logits: [B, T, V] float32.
      pinned: [B, T] int32, or None.
      allowed: bool that broadcasts to [B, T, V], or None.
    """
    tokens = jnp.arange(logits.shape[-1])
    if allowed is not None:
        logits = jnp.where(allowed | ~jnp.any(allowed, -1, keepdims=True), logits, -jnp.inf)
    if pinned is not None:
        # The pinned token gets probability 1, even if the model gives it probability 0.
        is_pinned = tokens == pinned[..., None]  # [B, T, V]
        logits = jnp.where(pinned[..., None] == OPEN, logits, jnp.where(is_pinned, 0.0, -jnp.inf))
    return logits


def without_unknown(logits: Float[Array, '*B V'], vocab_size: int | None) -> Float[Array, '*B V']:
    """Returns the logits with -inf for all ids that the tokenizer does not have.

    A model can have more embedding rows than its tokenizer has tokens (Gemma 3 4B and larger:
    262,208 rows for 262,144 tokens). Such an id has no text and must never be drawn.

    Args:
      logits: [..., V] float32.
      vocab_size: the number of tokens of the tokenizer, at most V; None if it is V.
    """
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def pin(responses: Sequence[Sequence[int | None]]) -> Int[Array, 'B T']:
    """Returns `Controls.pinned` for one list per row: token ids, or None for an open position."""
    width = max((len(row) for row in responses), default=0)
    pinned = np.full((len(responses), max(width, 1)), OPEN, np.int32)
    for row, response in zip(pinned, responses, strict=True):
        row[: len(response)] = [OPEN if token is None else token for token in response]
    return jnp.asarray(pinned)


def allow(tokens: Sequence[int], vocab_size: int) -> Bool[Array, ' {vocab_size}']:
    """Returns a row [V] of `Controls.allowed_sets` that allows only these tokens.

    Raises:
      ValueError: if one of them is not a token id.
    """
    wrong = [t for t in tokens if not is_integer(np.asarray(t)) or not 0 <= t < vocab_size]
    if wrong:
        raise ValueError(f'token ids must be integers in [0, {vocab_size}), got {wrong}.')
    return jnp.zeros(vocab_size, bool).at[jnp.asarray(list(tokens), jnp.int32)].set(True)


def ban(tokens: Sequence[int], vocab_size: int) -> Bool[Array, ' {vocab_size}']:
    """Returns a row [V] of `Controls.allowed_sets` that allows all tokens except these.

    Raises:
      ValueError: if one of them is not a token id.
    """
    return ~allow(tokens, vocab_size)


def exact_lengths(lengths: Sequence[int], stop_ids: Sequence[int], vocab_size: int) -> Controls:
    """Returns controls under which the response of row r has exactly lengths[r] tokens.

    Args:
      lengths: the number of tokens of each response, including its stop token; >= 1.
      stop_ids: the stop ids of the config; the first one ends the responses.
      vocab_size: the vocabulary size V.

    Raises:
      ValueError: if a length is < 1 or there is no stop token.
    """
    if min(lengths, default=0) < 1:
        raise ValueError(
            f'lengths must be >= 1, because they count the stop token, got {list(lengths)}.'
        )
    if not stop_ids:
        raise ValueError('A length target needs a stop token that ends the response.')
    positions = np.arange(max(lengths))
    ends = np.asarray(lengths)[:, None] - 1  # [B, 1], position of the stop token
    return Controls(
        pinned=jnp.asarray(np.where(positions == ends, stop_ids[0], OPEN), jnp.int32),
        allowed_sets=ban(stop_ids, vocab_size)[None],
        allowed_index=jnp.asarray(np.where(positions < ends, 0, OPEN), jnp.int32),
    )


def traced(array: AnyArray | None) -> jax.Array | None:
    """Returns an array of controls as a jax array, or None."""
    return None if array is None else jnp.asarray(array)


def is_known(array: Any) -> bool:
    """Returns whether the values of an array can be read on this host."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _slice(
    table: Int[AnyArray, 'B T'], offsets: Int[Array, ' B'], length: int
) -> Int[Array, 'B {length}']:
    """Returns columns of a table [B, T] -> [B, length] from offsets [B] on, OPEN after the end."""
    columns = offsets[:, None] + jnp.arange(length)
    return jnp.take_along_axis(table, columns, axis=1, mode='fill', fill_value=OPEN)


def is_integer(array: AnyArray) -> bool:
    """Returns whether an array holds integers."""
    return jnp.issubdtype(jnp.result_type(array), jnp.integer)


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
