"""From a regular expression, a JSON schema or a list of answers to a token automaton.

expression -> minimal automaton over bytes -> for each token, where its bytes lead from each state
-> classes of tokens that lead alike.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusiongemma.constraints import regex
from diffusiongemma.constraints.automaton import (
    DEAD,
    END,
    START,
    UNREACHABLE,
    TokenAutomaton,
    shortest_distances,
)
from diffusiongemma.constraints.dfa import TooManyStatesError
from diffusiongemma.constraints.expressions import literals
from diffusiongemma.constraints.json_schema import schema_dfa
from diffusiongemma.constraints.nfa import compile_expression
from diffusiongemma.data.tokenizer import Tokenizer


def from_regex(
    pattern: str,
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_states: int = 20_000,
) -> TokenAutomaton:
    """Returns the automaton of responses that a regular expression matches as a whole.

    Args:
      pattern: in Python's syntax and sense, see `regex.byte_automaton`.
      tokenizer: the model's tokenizer.
      stop_ids: tokens that end a response; None for the tokenizer's.
      vocab_size: V of the model; None for the tokenizer's. Tokens beyond the tokenizer's are
        never allowed.
      max_states: limit of the states of the automaton over bytes, before it is minimized.
        Repetition counts multiply: `.{0,100}` takes about 800, for a character of UTF-8 has up
        to four bytes.

    Raises:
      ValueError: when the pattern is invalid, uses what is not supported, matches no string or
        none that the vocabulary can spell, or takes more than max_states states.
    """
    table, accepting = regex.byte_automaton(pattern, max_states)
    what = f'what {regex.shown(pattern)} matches'
    return _from_bytes(table, accepting, tokenizer, what, stop_ids, vocab_size)


def from_json_schema(
    schema: Any,
    tokenizer: Tokenizer,
    separators: tuple[str, str] = (',', ':'),
    *,
    any_depth: int = 1,
    stop_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_states: int = 20_000,
) -> TokenAutomaton:
    """Returns the automaton of responses that are JSON and valid under a schema.

    Args:
      schema: the schema, or its text; docs/constraints.md lists what it may hold.
      tokenizer: the model's tokenizer.
      separators: between items and after keys, as of `json.dumps`: (', ', ': ') for blanks.
      any_depth: how deep arrays and objects nest in a value without any constraint.
      stop_ids: as of `from_regex`.
      vocab_size: as of `from_regex`.
      max_states: as of `from_regex`.

    Raises:
      ValueError: when the schema is invalid, uses what is not supported (the message names the
        keyword and its path), allows no value or none that the vocabulary can spell, or takes
        more than max_states states.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except RecursionError:
            raise ValueError('The schema is nested too deeply. Nest fewer schemas.') from None
        except ValueError as error:
            raise ValueError(f'The schema is not valid JSON: {error}. Correct its text.') from None
    dfa = schema_dfa(schema, separators, max_states=max_states, any_depth=any_depth)
    what = 'the values of the schema'
    return _from_bytes(dfa.by_byte(), dfa.accepting, tokenizer, what, stop_ids, vocab_size)


def from_texts(
    answers: Sequence[str],
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_states: int = 20_000,
) -> TokenAutomaton:
    """Returns the automaton of responses that are one of the answers.

    Raises:
      ValueError: when there are no answers, when they are not text or none that the vocabulary
        can spell, and as of `from_regex`.
    """
    if not answers:
        raise ValueError('No answers to choose from: pass at least one text.')
    try:
        dfa = compile_expression(literals(answers), max_states)
    except UnicodeEncodeError:
        raise ValueError(
            'An answer holds half of a surrogate pair (U+D800 to U+DFFF), which is no character. '
            'Remove it.'
        ) from None
    except TooManyStatesError:
        raise ValueError(
            f'The answers take more than max_states={max_states} states. Pass fewer or shorter '
            'ones, or raise max_states.'
        ) from None
    what = 'one of the answers'
    return _from_bytes(dfa.by_byte(), dfa.accepting, tokenizer, what, stop_ids, vocab_size)


def _from_bytes(
    byte_table: np.ndarray,
    accepting: np.ndarray,
    tokenizer: Tokenizer,
    what: str,
    stop_ids: Sequence[int] | None,
    vocab_size: int | None,
) -> TokenAutomaton:
    """Returns the automaton over tokens of one over bytes.

    Args:
      byte_table: [S, 256] int32; state 0 is dead, 1 the start.
      accepting: [S] bool.
      tokenizer: the model's tokenizer.
      what: what the automaton accepts, for errors.
      stop_ids: as of `from_regex`.
      vocab_size: as of `from_regex`.
    """
    columns, token_columns = _spell(byte_table, _vocabulary(tokenizer))
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    vocab_size = vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f'vocab_size={vocab_size} is less than the {tokenizer.vocab_size} tokens of the '
            "tokenizer. Pass the model's, or None."
        )
    if not stop_ids or not 0 <= min(stop_ids) <= max(stop_ids) < vocab_size:
        raise ValueError(
            f'stop_ids must hold tokens in [0, {vocab_size}), one at least, got {stop_ids}; '
            'without one no response would end.'
        )
    token_columns = np.pad(token_columns, (0, vocab_size - len(token_columns)))
    token_columns[list(stop_ids)] = len(columns)  # a column of their own
    classes, next_states = _prune(*_with_end(columns, accepting), token_columns)
    automaton = TokenAutomaton.create(classes, next_states)
    if automaton.min_tokens == UNREACHABLE:
        raise ValueError(
            f'No sequence of tokens of this vocabulary spells {what}. '
            'Does the tokenizer lack byte tokens?'
        )
    return automaton


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the bytes of each token.

    Raises:
      ValueError: where a text is more than the bytes of its tokens.
    """
    vocabulary = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    blank = next((i for i, text in enumerate(vocabulary) if text.startswith(b' ')), None)
    if blank is not None and not tokenizer.decode([blank]).startswith(' '):
        raise ValueError(
            f'{tokenizer} drops the blank before a text (add_dummy_prefix), so that its '
            'tokens do not spell what it decodes. Constraints need a tokenizer that does not.'
        )
    return vocabulary


def _spell(byte_table: np.ndarray, vocabulary: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the bytes of each token lead from each state.

    All tokens grow by a byte at a time. Those whose first bytes lead alike from every state are
    one from there on, so that the work is that of the distinct columns and not of the vocabulary.

    Args:
      byte_table: [S, 256] int32.
      vocabulary: bytes of each token; tokens without bytes lead to the dead state.

    Returns:
      [K, S] int32, the distinct columns, of which the first is dead; and [V] int64, the column
      of each token.
    """
    lengths = np.array([len(text) for text in vocabulary])
    padded = np.zeros((len(vocabulary), max(lengths.max(), 1)), np.uint8)
    for row, text in zip(padded, vocabulary, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    num_states = len(byte_table)
    columns = [np.zeros(num_states, np.int32), np.arange(num_states, dtype=np.int32)]
    numbers = {column.tobytes(): i for i, column in enumerate(columns)}
    token_columns = np.where(lengths > 0, 1, 0)
    for position in range(lengths.max()):
        growing = np.flatnonzero((lengths > position) & (token_columns > 0))
        pairs = token_columns[growing] * 256 + padded[growing, position]
        distinct, inverse = np.unique(pairs, return_inverse=True)
        grown = np.empty(len(distinct), np.int64)
        for i, (column, byte) in enumerate(zip(distinct // 256, distinct % 256, strict=True)):
            reached = byte_table[columns[column], byte]
            grown[i] = numbers.setdefault(reached.tobytes(), len(columns))
            if grown[i] == len(columns):
                columns.append(reached)
        token_columns[growing] = grown[inverse]
    used, token_columns = np.unique(np.append(0, token_columns), return_inverse=True)
    return np.stack([columns[i] for i in used]), token_columns[1:]


def _with_end(columns: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds the states that every automaton has, and the column of the stop tokens.

    Args:
      columns: [K, S] int32; state 0 is dead, 1 the start.
      accepting: [S] bool.

    Returns:
      [S + 2, K + 1] int32, the table; and [S + 2] bool, the states that tokens lead to.
    """
    offset = START - 1
    table = np.empty((len(accepting) + offset, len(columns) + 1), np.int32)
    table[offset:, :-1] = np.where(columns > 0, columns + offset, DEAD).T
    table[offset:, -1] = np.where(accepting, END, DEAD)
    table[:START] = np.arange(START)[:, None]
    reached = np.zeros(len(table), bool)
    frontier = np.array([START])
    while frontier.size:
        reached[frontier] = True
        targets = np.unique(table[frontier])
        frontier = targets[~reached[targets]]
    return table, reached


def _prune(
    table: np.ndarray, reached: np.ndarray, token_columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drops unused states and merges the columns that are equal then.

    Returns:
      [V] token classes and [N, K] next states.
    """
    kept = reached & (shortest_distances(table) < UNREACHABLE)
    kept[: START + 1] = True
    numbers = np.where(kept, np.cumsum(kept) - 1, DEAD)
    columns, classes = np.unique(numbers[table[kept]], axis=1, return_inverse=True)
    return classes.ravel()[token_columns], columns
