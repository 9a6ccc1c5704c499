"""Parses rules from text, for configs and command lines; the format is their repr, 'TopK(k=4)'."""

import ast
import math
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
    method, classes = RULES[field]
    if isinstance(value, str):
        known = {cls.__name__: cls for cls in classes}
        try:
            value = _evaluate(ast.parse(value.strip(), mode='eval').body, known)
        except (SyntaxError, TypeError) as error:
            raise ValueError(
                f'{field}={value!r} names no rule; write one of {", ".join(known)}, with its '
                f'numbers in parentheses, as Python prints it ({error}).'
            ) from error
    if value is not None and not hasattr(value, method):
        names = ', '.join(cls.__name__ for cls in classes)
        raise ValueError(
            f'{field}={value!r} has no method {method}, which such a rule needs; there are {names}.'
        )
    return value


def _evaluate(node: ast.expr, known: dict[str, type]) -> Any:
    """Returns the value of a rule constructor or of its arguments; else raises TypeError."""
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in known:
            arguments = [_evaluate(argument, known) for argument in node.args]
            by_name = dict(_named(word, known) for word in node.keywords)
            return known[name](*arguments, **by_name)
        case ast.Name(id=name) if name in known:
            return known[name]()
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand, known)
        case ast.Name(id='inf'):
            return math.inf
        case ast.Tuple() | ast.List():
            return tuple(_evaluate(element, known) for element in node.elts)
    raise TypeError(f'{ast.unparse(node)!r} is neither a rule nor a number')


def _named(word: ast.keyword, known: dict[str, type]) -> tuple[str, Any]:
    """Returns name and value of a keyword argument; raises the errors of `_evaluate`."""
    value = _evaluate(word.value, known)
    if word.arg is None:  # `**mapping`
        raise TypeError('keywords must be strings')
    return word.arg, value
