"""Structured output: regular expressions, JSON schemas and lists of answers as token automata."""

from diffusiongemma.constraints.automaton import (
    DEAD,
    END,
    FREE,
    START,
    TokenAutomaton,
    advance,
    allowed,
    trace,
)
from diffusiongemma.constraints.grammar import from_json_schema, from_regex, from_texts
from diffusiongemma.constraints.json_schema import to_pattern
from diffusiongemma.constraints.posterior import CanvasPosterior, condition

__all__ = [
    'DEAD',
    'END',
    'FREE',
    'START',
    'CanvasPosterior',
    'TokenAutomaton',
    'advance',
    'allowed',
    'condition',
    'from_json_schema',
    'from_regex',
    'from_texts',
    'to_pattern',
    'trace',
]
