"""Rules as text, for configs and command lines: what Python prints of them, 'TopK(k=4)'."""

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
    method, classes = RULES[field]
    if isinstance(value, str):
        known = {cls.__name__: cls for cls in classes}
        try:
            value = _evaluate(ast.parse(value.strip(), mode='eval').body, known)
        except (SyntaxError, TypeError) as error:
            raise ValueError(
                f'{field}={value!r} names no rule; write one of {", ".join(known)}, with its '
                f'numbers in brackets, as Python prints it ({error}).'
            ) from error
    if value is not None and not hasattr(value, method):
        names = ', '.join(cls.__name__ for cls in classes)
        raise ValueError(
            f'{field}={value!r} has no method {method}, which such a rule needs; there are {names}.'
        )
    return value


def _evaluate(node: ast.expr, known: dict[str, type]) -> Any:
    """Returns the value of a call of a rule, or of its arguments; raises TypeError on others."""
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
    """Returns name and value of an argument; raises TypeError as `_evaluate`."""
    value = _evaluate(word.value, known)
    if word.arg is None:  # two stars
        raise TypeError('keywords must be strings')
    return word.arg, value
