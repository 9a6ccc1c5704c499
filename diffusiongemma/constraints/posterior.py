"""The posterior distribution of a canvas, given that an automaton accepts it.

A denoise pass returns one independent distribution per canvas position. `condition` computes
their exact joint posterior, given that the canvas is the start of a response that the automaton
accepts and that can still end in time. The positions are then no longer independent; they form a
Markov chain over the states of the automaton. Sums and maxima over all valid canvases therefore
take one backward pass over the canvas, and draws take one forward pass (forward filtering and
backward sampling of hidden Markov models, Rabiner 1989, with the directions exchanged).

Tokens with the same transitions from every state share a class. The passes over the canvas only
see K classes and N states; the vocabulary is reduced once before and expanded once after them.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import FREE, TokenAutomaton


@flax.struct.dataclass
class CanvasPosterior:
    """A distribution over canvases, conditioned on the canvas being valid; see `condition`.

    A row is not `feasible` if it has no valid canvas: its state is dead, too few tokens remain,
    or logits of -inf exclude every valid canvas. Such a row is treated as if it were in the FREE
    state.

    Attributes:
      automaton: the automaton that accepts valid responses.
      logits: [B, C, V] float32, the logits of the independent positions.
      states: [B] int32, the state before the first position; FREE in rows that are not feasible.
      remaining: [B] int32, the number of tokens that each response may still have.
      feasible: [B] bool, whether a valid canvas exists.
      log_partition: [B, C, 1] float32, the log of the sum of exp(logits).
      class_scores: [B, C, K] float32, the log-probability of each token class.
      messages: [B, C + 1, N] float32, the log-probability that independent draws for this and all
        later positions are valid, if the state before this position is n.
    """

    automaton: TokenAutomaton
    logits: jax.Array
    states: jax.Array
    remaining: jax.Array
    feasible: jax.Array
    log_partition: jax.Array
    class_scores: jax.Array
    messages: jax.Array

    def log_marginals(self) -> jax.Array:
        """Returns the log-probability of each token at each position, [B, C, V] float32.

        It is -inf if no valid canvas has the token, or if the probability is below e^-87, the
        smallest normal float32.
        """

        def step(
            beliefs: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            scores, before, after = inputs  # [B, K], [B, N], [B, N]
            # Transition probabilities of the posterior: this avoids products of small numbers.
            log_odds = scores[:, None] + after[:, next_states] - _finite(before)[..., None]
            flow = beliefs[..., None] * jnp.exp(log_odds)  # [B, N, K]
            moved = flow.reshape(flow.shape[0], -1)  # [B, N * K]
            beliefs = jnp.zeros_like(beliefs).at[:, next_states.reshape(-1)].add(moved)  # [B, N]
            return beliefs, jnp.sum(flow, axis=1)  # [B, N], [B, K]

        next_states = self.automaton.next_states
        num_states, dtype = self.automaton.num_states, self.logits.dtype
        beliefs = jax.nn.one_hot(self.states, num_states, dtype=dtype)  # [B, N]
        by_position = jnp.moveaxis(self.messages, 1, 0)  # [C + 1, B, N]
        inputs = (jnp.moveaxis(self.class_scores, 1, 0), by_position[:-1], by_position[1:])
        _, masses = jax.lax.scan(step, beliefs, inputs)  # [C, B, K]
        shifts = jnp.log(jnp.moveaxis(masses, 0, 1)) - _finite(self.class_scores)  # [B, C, K]
        return self.logits - self.log_partition + shifts[..., self.automaton.token_classes]

    def draw(self, keys: jax.Array) -> jax.Array:
        """Returns one exact draw from the joint posterior, each row with its own key.

        This is the Gumbel-max trick: the best canvas under logits with Gumbel noise is a draw.
        In the FREE state the result equals that of `epilogue.draw_tokens` with the same keys.

        Args:
          keys: [B] random keys.

        Returns:
          [B, C] int32.
        """
        shape, dtype = self.logits.shape[1:], self.logits.dtype
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, dtype))(keys)
        return self._best(noise + self.logits, self.messages)

    def most_likely(self) -> jax.Array:
        """Returns the most probable valid canvas (Viterbi), [B, C] int32.

        In the FREE state it is the argmax of every position.
        """
        best = _class_max(self.automaton, self.logits)  # [B, C, K]
        messages = _backward(self.automaton, best - self.log_partition, self.remaining, jnp.max)
        return self._best(self.logits, messages)

    def _best(self, scores: jax.Array, messages: jax.Array) -> jax.Array:
        """Returns the canvas with the highest total score, [B, C] int32.

        Classes that lead to the same state have the same scores after it. So the forward pass
        chooses a path of states, and each token is the best one that connects two of them.

        Args:
          scores: [B, C, V] float32, the score of each token.
          messages: [B, C + 1, N] float32, the best score of all later positions for each state.
        """
        next_states = self.automaton.next_states

        def step(
            states: jax.Array, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            class_best, after = inputs  # [B, K], [B, N]
            targets = next_states[states]  # [B, K]
            totals = class_best + jnp.take_along_axis(after, targets, axis=1)  # [B, K]
            choice = jnp.argmax(totals, axis=-1)[:, None]  # [B, 1], the best class
            reached = jnp.take_along_axis(targets, choice, axis=1)
            return reached[:, 0], targets == reached  # [B], [B, K]

        class_best = _class_max(self.automaton, scores) - self.log_partition
        inputs = (jnp.moveaxis(class_best, 1, 0), jnp.moveaxis(messages, 1, 0)[1:])
        _, on_path = jax.lax.scan(step, self.states, inputs)  # [C, B, K]
        on_path = jnp.moveaxis(on_path, 0, 1)[..., self.automaton.token_classes]  # [B, C, V]
        return jnp.argmax(jnp.where(on_path, scores, -jnp.inf), axis=-1).astype(jnp.int32)


def condition(
    automaton: TokenAutomaton, logits: jax.Array, states: jax.Array, remaining: jax.Array
) -> CanvasPosterior:
    """Computes the distribution of a canvas, conditioned on the canvas being valid.

    A canvas is valid if the response ends within its first `remaining` positions or, if more than
    C tokens remain, if it can still end within the `remaining - C` tokens after the canvas.
    Positions after the end of a response are unconstrained. To fix a token, set all other logits
    to -inf; to ban one, set its own logit to -inf.

    This takes O(B C (V + N K)) time, and memory for B N (C + K) numbers in addition to arrays of
    the shape of the logits.

    Args:
      automaton: the automaton that accepts valid responses.
      logits: [B, C, V] float32, shaped logits; their softmax is the distribution per position.
      states: [B] int32, the state of each row before the canvas.
      remaining: [B] int32, the number of tokens that the response may still have, starting at
        the first canvas position.

    Raises:
      ValueError: if logits and automaton have different vocabulary sizes.
    """
    if logits.shape[-1] != automaton.vocab_size:
        raise ValueError(
            f'The logits have {logits.shape[-1]} tokens, the automaton {automaton.vocab_size}; '
            "compile it with vocab_size set to the model's."
        )
    top = _finite(_class_max(automaton, logits))  # [B, C, K]
    weights = jnp.exp(logits - top[..., automaton.token_classes])  # [B, C, V], at most 1
    class_scores = top + jnp.log(_by_class(automaton, weights, jax.ops.segment_sum))
    log_partition = _finite(jax.nn.logsumexp(class_scores, axis=-1, keepdims=True))  # [B, C, 1]
    class_scores = class_scores - log_partition
    messages = _backward(automaton, class_scores, remaining, jax.nn.logsumexp)
    first = jnp.take_along_axis(messages[:, 0], states[:, None], axis=1)[:, 0]  # [B]
    feasible = first > -jnp.inf
    return CanvasPosterior(
        automaton=automaton,
        logits=logits,
        states=jnp.where(feasible, states, FREE),
        remaining=remaining,
        feasible=feasible,
        log_partition=log_partition,
        class_scores=class_scores,
        messages=messages,
    )


def _backward(
    automaton: TokenAutomaton,
    class_scores: jax.Array,
    remaining: jax.Array,
    reduce: Callable[..., jax.Array],
) -> jax.Array:
    """Returns the score of each position and all later ones, for each state before the position.

    Args:
      automaton: the automaton that accepts valid responses.
      class_scores: [B, C, K] float32, the score of each token class.
      remaining: [B] int32, the number of tokens that the response may still have.
      reduce: the sum or the maximum of scores along an axis, in the log domain.

    Returns:
      [B, C + 1, N] float32; -inf if the response cannot end in time.
    """
    length = class_scores.shape[1]

    def only_in_time(message: jax.Array, position: int | jax.Array) -> jax.Array:
        limits = jnp.maximum(remaining - position, 0)  # [B], tokens that may still follow
        return jnp.where(automaton.distances <= limits[:, None], message, -jnp.inf)

    def step(after: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, position = inputs  # [B, K], []
        totals = scores[:, None] + after[:, automaton.next_states]  # [B, N, K]
        before = only_in_time(reduce(totals, axis=-1), position)
        return before, before

    shape = (class_scores.shape[0], automaton.num_states)
    last = only_in_time(jnp.zeros(shape, class_scores.dtype), length)
    inputs = (jnp.moveaxis(class_scores, 1, 0), jnp.arange(length))
    _, messages = jax.lax.scan(step, last, inputs, reverse=True)  # [C, B, N]
    return jnp.concatenate([jnp.moveaxis(messages, 0, 1), last[:, None]], axis=1)


def _class_max(automaton: TokenAutomaton, scores: jax.Array) -> jax.Array:
    return _by_class(automaton, scores, jax.ops.segment_max)


def _by_class(
    automaton: TokenAutomaton, values: jax.Array, segment_op: Callable[..., jax.Array]
) -> jax.Array:
    """Returns values that are reduced over the tokens of each class, [B, C, V] -> [B, C, K]."""
    by_token = jnp.moveaxis(values, -1, 0)  # [V, B, C]
    reduced = segment_op(by_token, automaton.token_classes, num_segments=automaton.num_classes)
    return jnp.moveaxis(reduced, 0, -1)  # from [K, B, C]


def _finite(values: jax.Array) -> jax.Array:
    """Returns the values with 0 for -inf, so that differences of two -inf are not NaN."""
    return jnp.where(values == -jnp.inf, 0.0, values)
