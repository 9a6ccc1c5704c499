"""Tests each keyword of JSON schemas: the generated texts and the size of the automaton."""

import datetime
import ipaddress
import json
import math
import random
import re
import uuid
from fractions import Fraction
from pathlib import Path

import pytest
from schema_cases import distances, validator, walk

from diffusiongemma.constraints.json_schema import schema_dfa, to_pattern
from diffusiongemma.constraints.nfa import compile_expression
from diffusiongemma.constraints.numbers import Bounds, integers, numbers
from diffusiongemma.constraints.strings import FORMATS

BOOLEAN = {'type': 'boolean'}
PYDANTIC = json.loads((Path(__file__).parent / 'data' / 'pydantic_schema.json').read_text())


def compiled(schema, **options):
    return schema_dfa(schema, max_states=20_000, **options)


def generated(dfa, count, budget=30):
    rng, to_end = random.Random(0), distances(dfa)
    return [walk(dfa, rng, to_end, budget).decode() for _ in range(count)]


def with_properties(count, part):
    return {'type': 'object', 'properties': {f'field_{i}': part for i in range(count)}}


@pytest.mark.parametrize('outer, inner, limit', [(10, 0, 200), (40, 0, 900), (10, 10, 2200)])
def test_optional_properties_take_states_in_proportion_to_their_number(outer, inner, limit):
    dfa = compiled(with_properties(outer, with_properties(inner, BOOLEAN) if inner else BOOLEAN))
    assert dfa.num_states < limit
    names = [f'field_{i}' for i in range(0, outer, 3)]
    value = {} if inner else True
    text = json.dumps(dict.fromkeys(names, value), separators=(',', ':'))
    assert dfa.accepts(text.encode()) and not dfa.accepts(text.replace('}', ',}', 1).encode())


def test_a_pattern_of_many_optional_properties_stays_short():
    assert len(to_pattern(with_properties(64, BOOLEAN))) < 64**1.6 * 60


def test_the_schema_of_a_pydantic_model_is_supported():
    dfa = compiled(PYDANTIC)
    for text in generated(dfa, 200, budget=400):
        assert validator(PYDANTIC).is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    'name',
    ['a/b', '~', '~1', '%', '%25', 'a b', 'é', '"', '', '0', 'a%2Fb', '\\'],
)
@pytest.mark.parametrize('quoted', [False, True])
def test_a_reference_reaches_every_name(name, quoted):
    token = name.replace('~', '~0').replace('/', '~1').replace('%', '%25')
    if quoted:
        token = ''.join(f'%{byte:02x}' for byte in token.replace('%25', '%').encode())
    schema = {'$ref': f'#/$defs/{token}', '$defs': {name: {'const': 1}}}
    assert compiled(schema).accepts(b'1')


def test_a_reference_counts_the_items_of_a_list():
    schema = {'anyOf': [{'const': 1}, {'type': 'array', 'items': {'$ref': '#/anyOf/0'}}]}
    assert compiled(schema).accepts(b'[1,1]')
    for token in ('2', '-', '00', '-1', '9' * 99):
        with pytest.raises(ValueError, match='leads nowhere'):
            compiled({**schema, '$ref': f'#/anyOf/{token}'})


@pytest.mark.parametrize(
    'schema, accepted, refused',
    [
        ({'type': 'integer'}, ['2', '-10', '0'], ['2.0', '1e2', '-0', '02', '']),
        ({'type': 'number'}, ['2', '2.0', '-0.0', '1e-05', '1e+300', '5e-324'], ['.5', '1.']),
        ({'type': 'array', 'items': BOOLEAN, 'minItems': 2.0}, ['[true,true]'], ['[true]', '[]']),
        ({'type': 'string', 'maxLength': 1.0}, ['"é"', '"\\""', '""'], ['"ab"']),
        ({'const': 2.0}, ['2', '2.0'], ['2.00', '"2"']),
        ({'const': 2.0, 'type': 'integer'}, ['2'], ['2.0']),
        ({'enum': [1, True]}, ['1', 'true'], ['1.0', 'false']),
        ({'type': 'integer', 'multipleOf': 5.0}, ['-5', '0', '10'], ['7', '5.0']),
        ({'type': 'integer', 'minimum': 1.5}, ['2', '100'], ['1', '-2']),
        ({'type': 'string', 'pattern': '^a|b$'}, ['"ax"', '"xb"'], ['"x"', '"b\\n"']),
        ({'properties': {'a': False}}, ['{}', '1'], ['{"a":1}']),
        ({'type': 'object', 'properties': {}}, ['{}'], ['{"a":1}']),
        ({'type': 'object'}, ['{}', '{"a":1,"b":[2]}'], ['{a:1}', '[]']),
        (
            {'type': 'array', 'uniqueItems': True, 'items': {'enum': [1, 'a']}},
            ['[]', '[1]', '["a",1]'],
            ['[1,1]'],
        ),
        (
            {'type': 'object', 'additionalProperties': BOOLEAN, 'minProperties': 1},
            ['{"a":true}'],
            ['{}', '{"a":1}'],
        ),
        ({'minItems': 2, 'prefixItems': [{'const': 1}], 'items': BOOLEAN}, ['[1,true]'], ['[1]']),
    ],
)
def test_a_keyword_holds(schema, accepted, refused):
    dfa = compiled(schema)
    assert [text for text in accepted if not dfa.accepts(text.encode())] == []
    assert [text for text in refused if dfa.accepts(text.encode())] == []


def test_a_free_value_nests_as_deep_as_asked():
    for depth in range(3):
        dfa = compiled(True, any_depth=depth)
        nested = ['1', '[1]', '[{"a":1}]', '[[[1]]]']
        assert [dfa.accepts(text.encode()) for text in nested].count(True) == depth + 1


READERS = {
    'date': datetime.date.fromisoformat,
    'time': datetime.time.fromisoformat,
    'date-time': datetime.datetime.fromisoformat,
    'uuid': uuid.UUID,
    'uuid4': lambda text: uuid.UUID(text, version=4),
    'ipv4': ipaddress.IPv4Address,
    'ipv6': ipaddress.IPv6Address,
}


@pytest.mark.parametrize('name', READERS)
def test_a_format_is_one_that_python_reads(name):
    for text in generated(compiled({'type': 'string', 'format': name}), 200):
        READERS[name](json.loads(text))


def test_every_day_of_a_leap_cycle_is_a_date():
    day, end = datetime.date(1896, 1, 1), datetime.date(1905, 1, 1)
    while day < end:
        assert re.fullmatch(FORMATS['date'], day.isoformat())
        day += datetime.timedelta(1)
    for text in ('1900-02-29', '2023-02-29', '2024-04-31', '2024-13-01', '0000-01-01'):
        assert not re.fullmatch(FORMATS['date'], text)


ENDS = [0, 1, -1, 2.5, 0.1, -0.3, 100, 1e-5, 1e16, 1e23, -1e300, 5e-324, 2**53 + 1, 0.0001]


def draw_number(rng):
    if rng.random() < 0.5:
        return rng.choice(ENDS)
    return rng.choice([rng.randint(-999, 999), rng.uniform(-1, 1) * 10 ** rng.randint(-20, 25)])


@pytest.mark.parametrize('seed', range(40))
def test_bounds_hold_for_numbers_as_python_reads_them(seed):
    rng = random.Random(seed)
    low, high = sorted(Fraction(draw_number(rng)) for _ in range(2))
    ends = rng.choice([(low, high), (low, None), (None, high)])
    bounds = Bounds(*ends, rng.random() < 0.4, rng.random() < 0.4)
    near = [math.nextafter(float(end or 0), way) for end in ends for way in (-math.inf, math.inf)]
    near += [float(end or 0) for end in ends] + [draw_number(rng) for _ in range(20)]
    whole = [math.floor(value) for value in near if abs(value) < 1e29]
    for expression, values in (
        (numbers(bounds), near + whole),
        (integers(*bounds.integers()), whole),
    ):
        dfa = compile_expression(expression, 20_000)
        for value in values:
            assert dfa.accepts(json.dumps(value).encode()) == bounds.hold(value), value
        if not dfa.is_empty:
            for text in generated(dfa, 40):
                assert bounds.hold(json.loads(text)), text
