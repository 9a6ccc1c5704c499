"""A finite automaton over tokens, and walks through it.

Tokens that lead alike from every state share a class, so that its table has a column for each of
K classes and not for each token. `posterior` draws canvases that the automaton accepts, `grammar`
compiles automata.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# States that every automaton has, by index.
DEAD = 0  # no response can be completed any more; nothing leaves it
FREE = 1  # unconstrained: every token leads back here
END = 2  # the stop token has been; what follows is no part of the response
START = 3

# Distance of states from which no response can be completed.
UNREACHABLE = 2**30


@flax.struct.dataclass
class TokenAutomaton:
    """A deterministic automaton over tokens; see `grammar` for how to compile one.

    A response is accepted when its last token, the stop token, leads to END. Automata of equal
    shapes are served by one compiled program.

    Attributes:
      token_classes: [V] int32, class of each token.
      next_states: [N, K] int32, the state after a token of a class.
      distances: [N] int32, fewest tokens from a state to END, the stop token included. 0 for END
        and FREE, UNREACHABLE where there is no way.
    """

    token_classes: jax.Array
    next_states: jax.Array
    distances: jax.Array

    @classmethod
    def create(
        cls, token_classes: np.ndarray, next_states: np.ndarray, *, multiple: int = 64
    ) -> 'TokenAutomaton':
        """Returns an automaton with distances and padded tables.

        Args:
          token_classes: [V] integer, values in [0, K).
          next_states: [N, K] integer. The rows DEAD, FREE and END lead to themselves alone.
          multiple: N and K are rounded up to a multiple of it, so that few shapes occur. Added
            states are dead, added classes have no token.

        Raises:
          ValueError: when the tables do not fit together.
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
        """The number of states N, padding included."""
        return self.next_states.shape[0]

    @property
    def num_classes(self) -> int:
        """The number of classes K, padding included."""
        return self.next_states.shape[1]

    @property
    def vocab_size(self) -> int:
        """The vocabulary size V."""
        return self.token_classes.shape[0]

    @property
    def min_tokens(self) -> int:
        """The number of tokens of the shortest response, the stop token included."""
        return int(self.distances[START])


def shortest_distances(next_states: np.ndarray) -> np.ndarray:
    """Returns the fewest tokens from each state to END or FREE: [N, K] -> [N] integer.

    Breadth-first search against the arrows.
    """
    num_states, num_classes = next_states.shape
    by_target = np.argsort(next_states, axis=None, kind='stable')
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
    """Returns the states that a walk passes through.

    Args:
      automaton: the automaton.
      states: [B] int32, each row's state before its first token.
      tokens: [B, T] int32.

    Returns:
      [B, T + 1] int32; column i is the state after i tokens.
    """

    def step(states: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = automaton.next_states[states, classes]
        return states, states

    _, path = jax.lax.scan(step, states, automaton.token_classes[tokens].T)  # [T, B]
    return jnp.concatenate([states[:, None], path.T], axis=1)


def advance(
    automaton: TokenAutomaton, states: jax.Array, tokens: jax.Array, counts: jax.Array
) -> jax.Array:
    """Returns the state after the first `counts` [B] tokens of each row, [B]; else as `trace`."""
    path = trace(automaton, states, tokens)
    return jnp.take_along_axis(path, counts[:, None], axis=1)[:, 0]


def allowed(automaton: TokenAutomaton, states: jax.Array, remaining: jax.Array) -> jax.Array:
    """Returns the next tokens after which the response can still end in time.

    Args:
      automaton: the automaton.
      states: [B] int32.
      remaining: [B] int32, tokens that the response may still have, the next one included.

    Returns:
      [B, V] bool. A row has no True exactly where its response can no longer end in time.
    """
    reached = automaton.distances[automaton.next_states[states]]  # [B, K]
    in_time = automaton.distances[states] <= jnp.maximum(remaining, 0)
    classes = (reached <= jnp.maximum(remaining - 1, 0)[:, None]) & in_time[:, None]
    return classes[:, automaton.token_classes]
