"""Rules as text, for configs and command lines: what Python prints of them, 'TopK(k=4)'.

A rule of one's own needs no entry here: named with its module, 'my_rules.Mine(k=4)', it is found.
"""

import ast
import dataclasses
import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from diffusiongemma.sampling.acceptance import (
    Ancestral,
    ConfidenceThreshold,
    EntropyBound,
    Margin,
    TopK,
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

# What a field of `SamplingConfig` may hold, the method that makes a rule one of its kind first.
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
    """Returns the rule that a field of `SamplingConfig` names; rules and None as they are.

    Args:
      field: 'acceptance', 'stopping' or 'drafts'.
      value: a rule, None, or text such as 'TopK(4)' or 'AllOf((TokenStability(2), Never()))'.

    Raises:
      ValueError: the text names no rule of this kind, or the rule refuses its numbers.
    """
    return read_value(field, value, *RULES[field])


def read_value(
    field: str, value: Any, method: str, classes: Sequence[type] = (), noun: str = 'rule'
) -> Any:
    """Returns what a field of a config names by text; other values as they are.

    Args:
      field: in words of the config, for errors.
      value: an object, None, or the text of a call of a dataclass.
      method: that the object must have.
      classes: those that are known by their name alone; others are named with their module.
      noun: what the value is, for errors.

    Raises:
      ValueError: the text names nothing of this kind, or the class refuses its arguments.
    """
    if isinstance(value, str):
        known = {cls.__name__: cls for cls in classes}
        try:
            value = _evaluate(ast.parse(value.strip(), mode='eval').body, known)
        except (SyntaxError, TypeError) as error:
            raise ValueError(
                f'{field}={value!r} names no {noun}; write {_choice(known)}, with its numbers in '
                f'brackets, as Python prints it ({error}).'
            ) from error
    if value is not None and not hasattr(value, method):
        names = [cls.__name__ for cls in classes]
        raise ValueError(
            f'{field}={value!r} has no method {method}, which such a {noun} needs; write '
            f'{_choice(names)}.'
        )
    return value


def _choice(known: Iterable[str]) -> str:
    own = "one of your own with its module, such as 'my_module.Mine(2)'"
    names = ', '.join(known)
    return f'one of {names}, or {own}' if names else own


def _evaluate(node: ast.expr, known: dict[str, type]) -> Any:
    """Returns the value of a call of a rule, or of its arguments; raises TypeError on others."""
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
    raise TypeError(f'{ast.unparse(node)!r} is neither a rule nor a number')


def _class_of(node: ast.expr, known: dict[str, type]) -> type:
    """Returns the dataclass that a name stands for, imported where it has a module before it."""
    name = ast.unparse(node)
    module, _, last = name.rpartition('.')
    cls: Any = known.get(name)
    if module:
        try:
            cls = getattr(importlib.import_module(module), last, None)
        except ImportError as error:
            raise TypeError(str(error)) from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f'{name!r} is neither a rule nor a number')
    return cls


def _named(word: ast.keyword, known: dict[str, type]) -> tuple[str, Any]:
    """Returns name and value of an argument; raises TypeError as `_evaluate`."""
    value = _evaluate(word.value, known)
    if word.arg is None:  # two stars
        raise TypeError('keywords must be strings')
    return word.arg, value
