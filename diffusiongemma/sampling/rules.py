"""Parses rules from text, for configs and command lines; the format is their repr, 'TopK(k=4)'.

A user-defined rule needs no entry here: its text starts with its module, 'my_rules.Mine(k=4)'.
"""

import ast
import dataclasses
import functools
import importlib
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.sampling.acceptance import (
    AcceptanceRule,
    Ancestral,
    ConfidenceThreshold,
    EntropyBound,
    Margin,
    Proposal,
    TopK,
    first_state,
    next_canvas,
)
from diffusiongemma.sampling.drafts import PromptLookup
from diffusiongemma.sampling.gibbs import GibbsSweep
from diffusiongemma.sampling.remasking import Remask
from diffusiongemma.sampling.stopping import (
    AllOf,
    MeanEntropy,
    Never,
    StableAndConfident,
    TokenStability,
)

# For each field of `SamplingConfig`: the method that its rules must have, and the known rules.
RULES: dict[str, tuple[str, tuple[type, ...]]] = {
    'acceptance': (
        'next_canvas',
        (EntropyBound, ConfidenceThreshold, TopK, Margin, Ancestral, GibbsSweep, Remask),
    ),
    'stopping': (
        'should_stop',
        (StableAndConfident, TokenStability, MeanEntropy, Never, AllOf),
    ),
    'drafts': ('draft', (PromptLookup,)),
}


def read_rule(field: str, value: Any) -> Any:
    """Returns the rule for a field of `SamplingConfig`; rules and None are returned unchanged.

    Args:
      field: 'acceptance', 'stopping' or 'drafts'.
      value: a rule, None, or text such as 'TopK(4)' or 'AllOf((TokenStability(2), Never()))'.

    Raises:
      ValueError: if the text does not name a rule of this kind, or a number is invalid.
    """
    return read_value(field, value, *RULES[field])


def read_value(
    field: str, value: Any, method: str, classes: Sequence[type] = (), noun: str = 'rule'
) -> Any:
    """Returns the object that a text in a config describes; other values are returned unchanged.

    Args:
      field: the name of the config field, for errors.
      value: an object, None, or the text of a call that constructs a dataclass.
      method: the name of a method that the object must have.
      classes: the dataclasses that need no module in the text.
      noun: the kind of value, for errors.

    Raises:
      ValueError: if the text does not describe such an object, or an argument is invalid.
    """
    if isinstance(value, str):
        by_name = {cls.__name__: cls for cls in classes}
        try:
            value = _evaluate(ast.parse(value.strip(), mode='eval').body, by_name)
        except (SyntaxError, TypeError) as error:
            raise ValueError(
                f'{field}={value!r} names no {noun}; write {_choice(by_name)}, with its numbers in '
                f'parentheses, as Python prints it ({error}).'
            ) from error
    if value is not None and not hasattr(value, method):
        names = [cls.__name__ for cls in classes]
        raise ValueError(
            f'{field}={value!r} has no method {method}, so it cannot be used here; write '
            f'{_choice(names)}.'
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, Hashable):
        raise ValueError(
            f'{field}={value!r} is not hashable, so no program can be compiled for it; write '
            f'@dataclasses.dataclass(frozen=True) above {type(value).__name__}.'
        )
    return value


@functools.cache  # configs are copied for every request, with the same rule
def check_rule(rule: AcceptanceRule, vocab_size: int | None = 4) -> None:
    """Checks a rule by tracing it with small shapes.

    Args:
      rule: the rule.
      vocab_size: the number of tokens of uniform noise; None for noise of mask tokens.

    Raises:
      ValueError: if it does not return a canvas, or is not for this kind of noise.
    """

    def trial() -> Any:
        tokens, zeros = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3))  # [B, C]
        proposal = Proposal(
            canvas=tokens,
            candidates=tokens,
            noise=tokens,
            open=tokens == 0,
            entropies=zeros,
            confidences=zeros,
            margins=zeros,
            noise_level=jnp.ones(()),
            next_noise_level=jnp.zeros(()),
            keys=jax.random.split(jax.random.key(0), 2),
            vocab_size=vocab_size,
            logits=jnp.zeros((2, 3, 4)),
        )
        return next_canvas(rule, proposal, first_state(rule, tokens))

    jax.eval_shape(trial)


def _choice(class_names: Iterable[str]) -> str:
    """Returns the possible values for an error message."""
    custom = "one of your own with its module, such as 'my_module.Mine(2)'"
    names = ', '.join(class_names)
    return f'one of {names}, or {custom}' if names else custom


def _evaluate(node: ast.expr, known: dict[str, type]) -> Any:
    """Returns the value of a rule constructor or of its arguments; else raises TypeError."""
    match node:
        case ast.Call(func=ast.Name() | ast.Attribute() as function):
            cls = _class_of(function, known)
            arguments = [_evaluate(argument, known) for argument in node.args]
            by_name = dict(_named(word, known) for word in node.keywords)
            return cls(*arguments, **by_name)
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand, known)
        case ast.Name(id='inf'):
            return math.inf
        case ast.Tuple() | ast.List():
            return tuple(_evaluate(element, known) for element in node.elts)
        case ast.Name() | ast.Attribute():
            return _class_of(node, known)()
    raise TypeError(
        f'{ast.unparse(node)!r} is neither a rule nor a number; arguments are numbers, tuples and '
        'other rules'
    )


def _class_of(node: ast.expr, known: dict[str, type]) -> type:
    """Returns the dataclass of a name, imported if the name starts with a module."""
    name = ast.unparse(node)
    module, _, last = name.rpartition('.')
    cls: Any = known.get(name)
    if module:
        try:
            cls = getattr(importlib.import_module(module), last, None)
        except Exception as error:  # importing a user's module may raise anything
            raise TypeError(
                f'importing {module} failed: {type(error).__name__}: {error}'
            ) from error
    if cls is None:
        where = f'the module {module} has no {last}' if module else 'no such name'
        raise TypeError(f'{name!r} is neither a rule nor a number: {where}')
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f'{name!r} is neither a rule nor a number: it must be a dataclass')
    return cls


def _named(word: ast.keyword, known: dict[str, type]) -> tuple[str, Any]:
    """Returns name and value of a keyword argument; raises the errors of `_evaluate`."""
    value = _evaluate(word.value, known)
    if word.arg is None:  # `**mapping`
        raise TypeError('keywords must be strings')
    return word.arg, value
