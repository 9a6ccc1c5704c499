"""A finite automaton over tokens, and functions that run it over token sequences.

Tokens that lead to the same next state from every state share a class, so the transition table
has one column per class (K) instead of one per token (V). `grammar` compiles automata;
`posterior` draws canvases that an automaton accepts.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Indices of the states that every automaton has.
DEAD = 0  # the response can no longer be completed; every token leads back here
FREE = 1  # unconstrained; every token leads back here
END = 2  # the stop token has occurred; later tokens are not part of the response
START = 3

# The distance of a state from which no response can be completed.
UNREACHABLE = 2**30


@flax.struct.dataclass
class TokenAutomaton:
    """A deterministic automaton over tokens; `grammar` compiles one.

    A response is accepted when its last token, the stop token, leads to END. One compiled program
    serves all automata of the same shapes.

    Attributes:
      token_classes: [V] int32, the class of each token.
      next_states: [N, K] int32, the next state for each state and token class.
      distances: [N] int32, the smallest number of tokens from each state to END, including the
        stop token; 0 for END and FREE, UNREACHABLE if END cannot be reached.
    """

    token_classes: jax.Array
    next_states: jax.Array
    distances: jax.Array

    @classmethod
    def create(
        cls, token_classes: np.ndarray, next_states: np.ndarray, *, multiple: int = 64
    ) -> 'TokenAutomaton':
        """Returns an automaton with computed distances and padded tables.

        Args:
          token_classes: [V] integer, values in [0, K).
          next_states: [N, K] integer. The rows DEAD, FREE and END only lead to themselves.
          multiple: N and K are rounded up to a multiple of this number, which limits the number
            of compiled shapes. Padded states are dead; padded classes have no token.

        Raises:
          ValueError: if the tables do not fit together.
        """
        token_classes, next_states = np.asarray(token_classes), np.asarray(next_states)
        num_states, num_classes = next_states.shape
        if not (token_classes.min() >= 0 and token_classes.max() < num_classes):
            raise ValueError(
                f'token_classes must lie in [0, {num_classes}), the columns of next_states; got '
                f'{token_classes.min()} to {token_classes.max()}.'
            )
        if not (next_states.min() >= 0 and next_states.max() < num_states):
            raise ValueError(
                f'next_states must lie in [0, {num_states}), its rows; got '
                f'{next_states.min()} to {next_states.max()}.'
            )
        for state in (DEAD, FREE, END):
            if np.any(next_states[state] != state):
                raise ValueError(f'Every token must lead from state {state} back to it.')
        used = np.isin(np.arange(num_classes), token_classes)
        # Classes without a token must not shorten distances.
        distances = shortest_distances(np.where(used, next_states, DEAD))
        rows, columns = -num_states % multiple, -num_classes % multiple
        return cls(
            token_classes=jnp.asarray(token_classes, jnp.int32),
            next_states=jnp.asarray(np.pad(next_states, ((0, rows), (0, columns))), jnp.int32),
            distances=jnp.asarray(
                np.pad(distances, (0, rows), constant_values=UNREACHABLE), jnp.int32
            ),
        )

    @property
    def num_states(self) -> int:
        """Returns the number of states N, including padding."""
        return self.next_states.shape[0]

    @property
    def num_classes(self) -> int:
        """Returns the number of classes K, including padding."""
        return self.next_states.shape[1]

    @property
    def vocab_size(self) -> int:
        """Returns the vocabulary size V."""
        return self.token_classes.shape[0]

    @property
    def min_tokens(self) -> int:
        """Returns the number of tokens of the shortest response, including the stop token."""
        return int(self.distances[START])


def shortest_distances(next_states: np.ndarray) -> np.ndarray:
    """Returns the smallest number of tokens from each state to END or FREE, [N] integer.

    This is a breadth-first search from END and FREE along reversed transitions.

    Args:
      next_states: [N, K] integer.
    """
    num_states, num_classes = next_states.shape
    by_target = np.argsort(next_states, axis=None, kind='stable')  # [N * K], transitions by target
    bounds = np.searchsorted(next_states.ravel()[by_target], np.arange(num_states + 1))
    distances = np.full(num_states, UNREACHABLE)
    frontier, distance = np.array([FREE, END]), 0
    while frontier.size:
        distances[frontier] = distance
        arrows = np.concatenate([by_target[bounds[s] : bounds[s + 1]] for s in frontier])
        sources = np.unique(arrows // num_classes)
        frontier, distance = sources[distances[sources] == UNREACHABLE], distance + 1
    return distances


def trace(automaton: TokenAutomaton, states: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the states that the automaton passes through while it reads tokens.

    Args:
      automaton: the automaton.
      states: [B] int32, the state of each row before its first token.
      tokens: [B, T] int32.

    Returns:
      [B, T + 1] int32; column i is the state after i tokens.
    """

    def step(states: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = automaton.next_states[states, classes]  # [B]
        return states, states

    _, path = jax.lax.scan(step, states, automaton.token_classes[tokens].T)  # [T, B]
    return jnp.concatenate([states[:, None], path.T], axis=1)


def advance(
    automaton: TokenAutomaton, states: jax.Array, tokens: jax.Array, counts: jax.Array
) -> jax.Array:
    """Returns the state of each row after its first `counts` tokens, [B] int32.

    Args:
      automaton: the automaton.
      states: [B] int32, the state of each row before its first token.
      tokens: [B, T] int32.
      counts: [B] int32, values in [0, T].
    """
    path = trace(automaton, states, tokens)  # [B, T + 1]
    return jnp.take_along_axis(path, counts[:, None], axis=1)[:, 0]


def allowed(automaton: TokenAutomaton, states: jax.Array, remaining: jax.Array) -> jax.Array:
    """Returns which next tokens let the response still end within the remaining tokens.

    Args:
      automaton: the automaton.
      states: [B] int32, the current state of each row.
      remaining: [B] int32, the number of tokens that the response may still have, including the
        next one.

    Returns:
      [B, V] bool. A row is all False exactly when its response can no longer end in time.
    """
    reached = automaton.distances[automaton.next_states[states]]  # [B, K]
    in_time = automaton.distances[states] <= jnp.maximum(remaining, 0)
    classes = (reached <= jnp.maximum(remaining - 1, 0)[:, None]) & in_time[:, None]  # [B, K]
    return classes[:, automaton.token_classes]
