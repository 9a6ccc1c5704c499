"""Tests JSON schemas against the package jsonschema in both directions."""

import json
import random

import pytest
from schema_cases import Schemas, distances, is_huge, spellings, validator, walk

from diffusiongemma.constraints.json_schema import schema_dfa

MAX_STATES = 20_000


def accepts(dfa, value, limit=400):
    return any(dfa.accepts(text.encode()) for text in spellings(value, limit))


def check_case(seed):
    """Checks that generated texts are valid and that valid texts can be generated."""
    rng = random.Random(seed)
    schemas = Schemas(rng)
    schema = schemas.schema()
    valid = validator(schema).is_valid
    values = [schemas.example(schema, schema) for _ in range(4)]
    values += [schemas.value()]
    try:
        dfa = schema_dfa(schema, max_states=MAX_STATES)
    except ValueError as error:
        message = str(error)
        assert '#' in message and '\n' not in message and 'regular' not in message, message
        if message.startswith('No value is valid'):
            formatted = validator(schema, formats=True).is_valid
            assert not any(map(formatted, values)), (schema, message)
            return 'impossible'
        assert 'is not supported' in message, message
        return 'refused'
    for value in values:
        accepted = accepts(dfa, value)
        if accepted != valid(value) and not accepted:  # unless a documented limit says so
            deeper = schema_dfa(schema, max_states=MAX_STATES, any_depth=3)
            formatted = validator(schema, formats=True).is_valid(value)
            accepted = not formatted or is_huge(value) or accepts(deeper, value, 100_000)
        assert accepted == valid(value), (seed, schema, value, accepted)
    to_end = distances(dfa)
    for budget in (4, 20, 40):
        text = walk(dfa, rng, to_end, budget)
        assert valid(json.loads(text)), (seed, schema, text)
    return 'compiled'


def count_outcomes(seeds):
    outcomes = [check_case(seed) for seed in seeds]
    return {name: outcomes.count(name) / len(outcomes) for name in set(outcomes)}


@pytest.mark.parametrize('part', [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_two_thousand_schemas_agree_with_jsonschema(part):
    outcomes = count_outcomes(range(500 * part, 500 * part + 500))
    assert outcomes['compiled'] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize('part', range(20))
def test_fifty_thousand_schemas_agree_with_jsonschema(part):
    outcomes = count_outcomes(range(10_000 + 2500 * part, 10_000 + 2500 * part + 2500))
    assert outcomes['compiled'] > 0.8
