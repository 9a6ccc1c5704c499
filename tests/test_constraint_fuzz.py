"""Tests that random schemas and patterns compile correctly or raise a one-line ValueError."""

import json
import random
import re
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_cases import distances, validator, walk

from diffusiongemma.constraints.dfa import Dfa, TooManyStatesError, minimized
from diffusiongemma.constraints.json_schema import schema_dfa, to_pattern
from diffusiongemma.constraints.nfa import compile_expression
from diffusiongemma.constraints.regex import byte_automaton, parse

MAX_STATES = 1000
KEYWORDS = """type enum const properties required additionalProperties patternProperties pattern
    propertyNames minProperties maxProperties items prefixItems minItems maxItems uniqueItems format
    minLength maxLength minimum maximum exclusiveMinimum exclusiveMaximum multipleOf anyOf oneOf
    allOf not $ref $defs $id title default nullable x-a definitions if""".split()

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([1.0, 2.0, 0.5, -0.0, 1e16, 1e300, 10**400, float('inf')]),
    st.sampled_from(['a', '', '^a$', '(', r'\d', '\ud800', '\n', 'é', 'date', '~', '/']),
    st.sampled_from(['#', '#/$defs/a', '#/$defs/a~1', '#/items', '#/%zz', '#/anyOf/0', '#a']),
    st.sampled_from(['null', 'boolean', 'string', 'integer', 'number', 'array', 'object']),
)
keys = st.one_of(st.sampled_from(KEYWORDS), st.sampled_from(['a', 'a/', '^a', '(', 'é', '\ud800']))


def extend(inner):
    lists = st.lists(inner, max_size=3)
    objects = st.dictionaries(keys, inner, max_size=4)
    schemas = st.fixed_dictionaries(
        {},
        optional={
            'type': st.sampled_from(['integer', 'string', 'array', 'object', ['null', 'number']]),
            **dict.fromkeys(('items', 'additionalProperties', 'propertyNames'), inner),
            **dict.fromkeys(('anyOf', 'allOf', 'prefixItems'), lists),
            **dict.fromkeys(('properties', '$defs', 'patternProperties'), objects),
            **dict.fromkeys(('minimum', 'maxLength', 'minItems', 'const', '$ref'), scalars),
            'required': st.lists(st.sampled_from(['a', 'a/', 'é']), max_size=2),
        },
    )
    return st.one_of(lists, objects, schemas)


def check_message(error):
    assert type(error) is ValueError, repr(error)
    message = str(error)
    remedy = '. ' in message or 'must be' in message
    assert remedy and '\n' not in message and message.endswith('.'), message
    return message


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(scalars, extend, max_leaves=12), st.integers(0, 9))
def test_any_value_is_a_schema_or_refused_in_one_line(schema, seed):
    try:
        dfa = schema_dfa(schema, max_states=MAX_STATES)
    except ValueError as error:
        message = check_message(error)
        assert '#' in message or message.startswith('The schema'), message
        return
    rng, to_end = random.Random(seed), distances(dfa)
    for budget in (0, 5, 20):
        value = json.loads(walk(dfa, rng, to_end, budget))
        assert validator(schema).is_valid(value), value
    try:
        to_pattern(schema)
    except ValueError as error:
        check_message(error)


atoms = st.sampled_from(
    ['a', 'b', '.', r'\d', r'\W', '[ab]', '[^a]', '[a-é]', 'é', r'\.', '^', '$', r'\b', '', '(?i)',
     '(?=a)', r'\1', '(?s:.)', r'\x41', r'\N{BULLET}', '[', ')', '(?P<n>a)', r'\Z', '(?a:\\w)']
)  # fmt: skip
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(''.join),
        st.tuples(inner, inner).map('|'.join),
        inner.map('({})'.format),
        inner.map('(?:{})'.format),
        st.tuples(inner, st.sampled_from(['*', '+', '?', '{2}', '{0,2}', '{1,}', '*?'])).map(
            lambda pair: f'(?:{pair[0]}){pair[1]}'
        ),
    ),
    max_leaves=6,
)
subjects = st.lists(st.text('ab1é\n.-A•', max_size=5), max_size=6)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(patterns, st.text('ab()[]{}|*+?^$\\.,-:<>=!P12', max_size=12)), subjects)
def test_any_pattern_means_what_python_means_or_is_refused_in_one_line(pattern, texts):
    try:
        table, accepting = byte_automaton(pattern, MAX_STATES)
    except ValueError as error:
        check_message(error)
        return
    dfa = Dfa(np.arange(256), table, accepting)
    generated = [walk(minimized(dfa), random.Random(i), distances(dfa), 3 * i) for i in range(3)]
    for text in [*texts, *(text.decode() for text in generated)]:
        assert dfa.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), text
    assert all(dfa.accepts(text) for text in generated)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(patterns, subjects)
def test_a_search_finds_what_python_finds_with_anchors_anywhere(pattern, texts):
    try:
        dfa = compile_expression(parse(pattern, search=True), MAX_STATES)
    except TooManyStatesError:
        return
    except ValueError as error:
        check_message(error)
        return
    at_end = pattern.replace('$', r'\Z')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for text in texts:
            assert dfa.accepts(text.encode()) == bool(re.search(at_end, text)), text
