"""Compiles a regular expression, a JSON schema or a list of answers to a token automaton.

The steps are: expression -> minimal automaton over bytes -> for each token, the state that its
bytes lead to from each state -> classes of tokens with the same transitions.
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
      pattern: a regular expression in Python's syntax, see `regex.byte_automaton`.
      tokenizer: the model's tokenizer.
      stop_ids: tokens that end a response; None takes those of the tokenizer.
      vocab_size: V of the model; None takes that of the tokenizer. Tokens beyond the tokenizer's
        vocabulary are never allowed.
      max_states: the maximum number of states of the automaton over bytes, before minimization.
        Repetition counts multiply the states: `.{0,100}` takes about 800, because a UTF-8
        character has up to four bytes.

    Raises:
      ValueError: if the pattern is invalid, uses an unsupported feature, matches no string or
        none that the vocabulary can spell, or takes more than max_states states.
    """
    table, accepting = regex.byte_automaton(pattern, max_states)
    target = f'what {regex.shown(pattern)} matches'
    return _from_bytes(table, accepting, tokenizer, target, stop_ids, vocab_size)


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
      schema: the schema or its JSON text; docs/constraints.md lists the supported keywords.
      tokenizer: the model's tokenizer.
      separators: the texts between items and after keys, as in `json.dumps`; (', ', ': ') writes
        spaces.
      any_depth: the maximum nesting depth of arrays and objects in a value without constraints.
      stop_ids: see `from_regex`.
      vocab_size: see `from_regex`.
      max_states: see `from_regex`.

    Raises:
      ValueError: if the schema is invalid, uses an unsupported feature (the message names the
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
    target = 'the values of the schema'
    return _from_bytes(dfa.by_byte(), dfa.accepting, tokenizer, target, stop_ids, vocab_size)


def from_texts(
    answers: Sequence[str],
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_states: int = 20_000,
) -> TokenAutomaton:
    """Returns the automaton of responses that equal one of the answers.

    The other arguments are those of `from_regex`.

    Raises:
      ValueError: if there are no answers, if one is not valid text, if the vocabulary can spell
        none of them, or if they take more than max_states states.
    """
    if not answers:
        raise ValueError('No answers to choose from: pass at least one text.')
    try:
        dfa = compile_expression(literals(answers), max_states)
    except UnicodeEncodeError:
        raise ValueError(
            'An answer has half of a surrogate pair (U+D800 to U+DFFF), which is not a character. '
            'Remove it.'
        ) from None
    except TooManyStatesError:
        raise ValueError(
            f'The answers take more than max_states={max_states} states. Pass fewer or shorter '
            'ones, or raise max_states.'
        ) from None
    target = 'one of the answers'
    return _from_bytes(dfa.by_byte(), dfa.accepting, tokenizer, target, stop_ids, vocab_size)


def _from_bytes(
    byte_table: np.ndarray,
    accepting: np.ndarray,
    tokenizer: Tokenizer,
    target: str,
    stop_ids: Sequence[int] | None,
    vocab_size: int | None,
) -> TokenAutomaton:
    """Converts an automaton over bytes to one over tokens.

    Args:
      byte_table: [S, 256] int32; state 0 is dead, state 1 is the start.
      accepting: [S] bool, whether a text may end in each state.
      tokenizer: the model's tokenizer.
      target: a description of the accepted texts, for error messages.
      stop_ids: see `from_regex`.
      vocab_size: see `from_regex`.
    """
    columns, token_columns = _spell(byte_table, _vocabulary(tokenizer))
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    vocab_size = vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f'vocab_size={vocab_size} is less than the {tokenizer.vocab_size} tokens of the '
            "tokenizer. Pass the model's vocab_size, or None."
        )
    if not stop_ids or not 0 <= min(stop_ids) <= max(stop_ids) < vocab_size:
        raise ValueError(
            f'stop_ids must hold tokens in [0, {vocab_size}), at least one, got {stop_ids}; '
            'without one no response would end.'
        )
    token_columns = np.pad(token_columns, (0, vocab_size - len(token_columns)))
    token_columns[list(stop_ids)] = len(columns)  # stop tokens share one extra column
    classes, next_states = _prune(*_with_end(columns, accepting), token_columns)
    automaton = TokenAutomaton.create(classes, next_states)
    if automaton.min_tokens == UNREACHABLE:
        raise ValueError(
            f'No sequence of tokens of this vocabulary spells {target}. '
            'Does the tokenizer lack byte tokens?'
        )
    return automaton


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the bytes of each token.

    Raises:
      ValueError: if the decoded text differs from the concatenated bytes of the tokens.
    """
    vocabulary = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    blank = next((i for i, text in enumerate(vocabulary) if text.startswith(b' ')), None)
    if blank is not None and not tokenizer.decode([blank]).startswith(' '):
        raise ValueError(
            f'{tokenizer} drops the blank before a text (add_dummy_prefix), so the text that it '
            'decodes differs from the bytes of its tokens. Use a tokenizer without this option.'
        )
    return vocabulary


def _spell(byte_table: np.ndarray, vocabulary: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the state that the bytes of each token lead to from each state.

    All tokens are extended by one byte at a time. Tokens whose bytes so far lead to the same
    states are merged, so the cost depends on the number of distinct columns and not on V.

    Args:
      byte_table: [S, 256] int32, the next state for each state and byte.
      vocabulary: the bytes of each token; tokens without bytes lead to the dead state.

    Returns:
      [K, S] int32, the distinct columns, of which the first is dead; and [V] int64, the column
      of each token.
    """
    lengths = np.array([len(text) for text in vocabulary])
    padded = np.zeros((len(vocabulary), max(lengths.max(), 1)), np.uint8)  # [V, longest]
    for row, text in zip(padded, vocabulary, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    num_states = len(byte_table)
    columns = [np.zeros(num_states, np.int32), np.arange(num_states, dtype=np.int32)]
    numbers = {column.tobytes(): i for i, column in enumerate(columns)}
    token_columns = np.where(lengths > 0, 1, 0)  # [V]
    for position in range(lengths.max()):
        growing = np.flatnonzero((lengths > position) & (token_columns > 0))
        pairs = token_columns[growing] * 256 + padded[growing, position]
        distinct, inverse = np.unique(pairs, return_inverse=True)
        grown = np.empty(len(distinct), np.int64)
        for i, (column, byte) in enumerate(zip(distinct // 256, distinct % 256, strict=True)):
            reached = byte_table[columns[column], byte]  # [S]
            grown[i] = numbers.setdefault(reached.tobytes(), len(columns))
            if grown[i] == len(columns):
                columns.append(reached)
        token_columns[growing] = grown[inverse]
    used, token_columns = np.unique(np.append(0, token_columns), return_inverse=True)
    return np.stack([columns[i] for i in used]), token_columns[1:]


def _with_end(columns: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds the states that every automaton has and the column of the stop tokens.

    Args:
      columns: [K, S] int32; state 0 is dead, state 1 is the start.
      accepting: [S] bool, whether a text may end in each state.

    Returns:
      [S + 2, K + 1] int32, the transition table; and [S + 2] bool, whether each state can be
      reached.
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
    """Drops unused states and merges the columns that become equal.

    Returns:
      [V] token classes and [N, K] next states.
    """
    is_useful = reached & (shortest_distances(table) < UNREACHABLE)
    is_useful[: START + 1] = True
    numbers = np.where(is_useful, np.cumsum(is_useful) - 1, DEAD)  # [S + 2], new states
    columns, classes = np.unique(numbers[table[is_useful]], axis=1, return_inverse=True)
    return classes.ravel()[token_columns], columns
