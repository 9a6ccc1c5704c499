"""Generates random JSON schemas and values, and validates values with the package jsonschema.

If docs/constraints.md documents a limit, the schema or the validator has the same limit: see
`validator`.
"""

import copy
import itertools
import json
import math
import re
from fractions import Fraction

import jsonschema
import numpy as np

from diffusiongemma.constraints.strings import FORMATS

NAMES = ['a', 'b/c', '~d', 'é "q"', 'k\n']  # in the order of every schema
EXTRA = ['z1', 'zé', 'x-2', '']
TEXTS = ['', 'a', 'ab', 'abc', 'é', '"\\', '\n', 'a\tb', '😀x', '12', 'b', '2024-02-29', 'x' * 9]
PATTERNS = [
    '^[a-z]+$', 'b', '^a|b$', '^$', '[0-9]{2}', '^(?:a|é)*$', 'a.b', '^..?$',
]  # fmt: skip
RARE_PATTERNS = [r'^\d+$', r'(?a)\w', '[^b]$', '(?:^|é)a']  # of many states
KEY_PATTERNS = ['^z', 'é', '^x-', '[0-9]$']
NUMBERS = [
    0, 1, -1, 2, 3, 7, 10, 99, 100, -5, -17, 12345, 10**15, 0.5, -0.5, 0.1, 0.25, 1.5, 2.0, -3.0,
    1e-5, -2.5e-7, 1e16, 1e22, 3.14, 99.99, 1e-4, 123456.789, 2**53, -(2**60), 1e300, 0.30000000001,
]  # fmt: skip
BOUNDS = [0, 1, 2.0, -1, 10, -17, 0.5]
FORMAT_EXAMPLES = {
    'date': ['2024-02-29', '1999-12-31'],
    'time': ['12:00:59Z', '23:59:00.123456-05:30'],
    'date-time': ['2024-02-29T00:00:00Z'],
    'duration': ['P1DT2H', 'P3W'],
    'uuid': ['01234567-89ab-cdef-0123-456789abcdef'],
    'ipv6': ['0:0:0:0:0:0:0:1'],
    'ipv4': ['127.0.0.1'],
    'email': ['a.b@example.org'],
    'uri': ['https://example.org/a'],
}


def is_format(validator, name, instance, schema):
    if isinstance(instance, str) and name in FORMATS:
        if not re.fullmatch(FORMATS[name], instance):
            yield jsonschema.ValidationError('format')


def is_pattern(validator, pattern, instance, schema):
    if isinstance(instance, str) and not re.search(pattern.replace('$', r'\Z'), instance):
        yield jsonschema.ValidationError('pattern')


def is_multiple(validator, divisor, instance, schema):
    """Checks `multipleOf` exactly; the package divides floats (9007199254740995 and 5.0)."""
    if validator.is_type(instance, 'number') and Fraction(instance) % Fraction(divisor):
        yield jsonschema.ValidationError('multipleOf')


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {'pattern': is_pattern, 'multipleOf': is_multiple},
)
FormatValidator = jsonschema.validators.extend(Validator, {'format': is_format})


def validator(schema, formats=False):
    """Returns a validator whose objects with only (pattern)properties have no other names.

    See `closed`. As in JSON Schema, `format` is only checked if `formats` is True.
    """
    return (FormatValidator if formats else Validator)(closed(schema))


def closed(schema):
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    keep = ('enum', 'const', 'default', 'required')
    result = {
        k: v if k in keep else
        {name: closed(part) for name, part in v.items()}
        if k in ('properties', 'patternProperties', '$defs') else closed(v)
        for k, v in schema.items()
    }  # fmt: skip
    if {'properties', 'patternProperties'} & result.keys():
        result.setdefault('additionalProperties', False)
        if result['additionalProperties'] is False and schema.get('additionalProperties') is None:
            required = dict.fromkeys(schema.get('required', ()), True)
            result['properties'] = {**required, **result.get('properties', {})}
    return result


class Schemas:
    """A generator of random schemas; `rng` is a `random.Random`."""

    def __init__(self, rng):
        self.rng = rng
        self.defs = {}
        self.explicit = False  # whether objects say what other names there are

    def chance(self, p):
        return self.rng.random() < p

    def schema(self):
        result = self.part(self.rng.choice([1, 2, 2, 3]))
        if self.defs and isinstance(result, dict):
            result['$defs'] = self.defs
        return result

    def part(self, depth):
        kinds = ['null', 'boolean', 'integer', 'integer', 'number', 'string', 'string', 'enum']
        kinds += ['const', 'types', *(['any', 'bare'] if self.chance(0.4) else [])]
        if depth > 1:
            kinds += ['array', 'array', 'object', 'object', 'object', 'map', 'map']
            kinds += ['anyOf', 'oneOf', 'allOf', 'ref', 'optional']
        kind = self.rng.choice(kinds)
        if kind in ('array', 'object', 'map'):
            result = getattr(self, kind)(depth - 1)
        elif kind in ('anyOf', 'oneOf', 'allOf', 'ref', 'optional'):
            result = getattr(self, kind)(depth)
        else:
            result = getattr(self, kind)()
        if isinstance(result, dict) and self.chance(0.1):
            result['title'] = 'A title'
        return result

    def null(self):
        return {'type': 'null'}

    def boolean(self):
        return {'type': 'boolean'}

    def bounds(self):
        result = {}
        for names in (('minimum', 'exclusiveMinimum'), ('maximum', 'exclusiveMaximum')):
            if self.chance(0.4):
                rare = self.chance(0.15)  # new bounds take longer than known ones
                value = self.number_value() if rare else self.rng.choice(BOUNDS)
                result[self.rng.choice(names)] = value
        return result

    def number_value(self):
        if self.chance(0.6):
            return self.rng.choice(NUMBERS)
        if self.chance(0.5):
            return self.rng.randint(-1000, 1000)
        return round(self.rng.uniform(-20, 20), self.rng.randint(0, 4))

    def integer(self):
        result = {'type': 'integer', **self.bounds()}
        if self.chance(0.15):
            result['multipleOf'] = self.rng.choice([1, 2, 3, 7, 10, 2.0, 5.0])
        return result

    def number(self):
        result = {'type': 'number', **self.bounds()}
        if self.chance(0.05):
            result['multipleOf'] = self.rng.choice([2, 5])
        return result

    def limits(self, name, top):
        result = {}
        low = self.rng.randint(0, top)
        if self.chance(0.4):
            result[f'min{name}'] = self.rng.choice([low, float(low)])
        if self.chance(0.4):
            high = low + self.rng.randint(-1 if low else 0, top)
            result[f'max{name}'] = self.rng.choice([high, float(high)])
        return result

    def string(self):
        result = {'type': 'string', **self.limits('Length', 4)}
        if self.chance(0.3):
            patterns = RARE_PATTERNS if self.chance(0.05) else PATTERNS
            result['pattern'] = self.rng.choice(patterns)
        elif self.chance(0.1):
            return {'type': 'string', 'format': self.rng.choice(list(FORMATS))}
        return result

    def enum(self):
        result = {'enum': [self.value() for _ in range(self.rng.randint(1, 4))]}
        if self.chance(0.2):
            result['type'] = self.rng.choice(['integer', 'string', ['number', 'null'], 'number'])
        return result

    def const(self):
        return {'const': self.value()}

    def types(self):
        names = ['null', 'boolean', 'string', 'integer', 'number']
        result = {'type': self.rng.sample(names, self.rng.randint(1, 3))}
        return {**self.bounds(), **self.limits('Length', 3), **result}

    def choices(self):
        values = [None, 'a', 1, 2.0, True, 'b']
        return self.rng.choice(
            [{'type': 'boolean'}, {'enum': self.rng.sample(values, self.rng.randint(1, 4))}]
        )

    def any(self):
        return self.rng.choice([True, {}, {'title': 'A title'}, {}])

    def bare(self):
        """Returns keywords without a type."""
        return self.rng.choice([self.bounds(), self.limits('Length', 3), {'pattern': 'b'}])

    def array(self, depth):
        result = {'type': 'array', **self.limits('Items', 2)}
        if self.chance(0.4):
            count = self.rng.randint(1, 3)
            result['prefixItems'] = [self.part(depth) for _ in range(count)]
        if self.chance(0.7):
            result['items'] = self.part(depth) if self.chance(0.8) else False
        if self.chance(0.1):
            result['uniqueItems'] = self.chance(0.5)
            if self.chance(0.5):
                result.pop('prefixItems', None)
                result['items'] = self.choices()
        return result

    def object(self, depth):
        names = [name for name in NAMES if self.chance(0.5)]
        result = {'type': 'object', 'properties': {name: self.part(depth) for name in names}}
        result['required'] = [name for name in names if self.chance(0.5)]
        if self.chance(0.05):
            result['required'].append('zr')
        if self.explicit or self.chance(0.5):
            extra = self.rng.choice([False, False, True, self.part(depth)])
            result['additionalProperties'] = extra
        if self.chance(0.1):
            result |= self.limits('Properties', 2)
        return result

    def map(self, depth):
        result = {'type': 'object', **self.limits('Properties', 1)}
        if self.explicit or self.chance(0.8):
            result['additionalProperties'] = self.part(depth)
        if self.chance(0.3):
            patterns = self.rng.sample(KEY_PATTERNS, self.rng.randint(1, 2))
            result['patternProperties'] = {pattern: self.part(depth) for pattern in patterns}
        if self.chance(0.3):
            names = [{'enum': self.rng.sample(NAMES + EXTRA, 2)}, {'maxLength': 2}]
            result['propertyNames'] = self.rng.choice([*names, {'pattern': '^[a-z]'}])
        return result

    def anyOf(self, depth):  # noqa: N802
        return {'anyOf': [self.part(depth - 1) for _ in range(self.rng.randint(1, 3))]}

    def optional(self, depth):
        return {'anyOf': [self.part(depth - 1), {'type': 'null'}], 'default': None}

    def oneOf(self, depth):  # noqa: N802
        if self.chance(0.5):
            kinds = self.rng.sample(['string', 'integer', 'boolean', 'null', 'object', 'array'], 2)
            return {'oneOf': [{'type': kind} for kind in kinds]}
        return {
            'discriminator': {'propertyName': 'a'},
            'oneOf': [
                {
                    'type': 'object',
                    'properties': {'a': {'const': tag}, 'b/c': self.part(depth - 1)},
                    'required': ['a'],
                }
                for tag in ('x', 'y')
            ],
        }

    def allOf(self, depth):  # noqa: N802
        outer, self.explicit = self.explicit, True
        kind = self.rng.choice(['integer', 'number', 'string', 'object', 'map', 'array', 'part'])
        if kind in ('object', 'map', 'array'):
            parts = [getattr(self, kind)(depth - 1) for _ in range(2)]
        elif kind == 'part':
            parts = [self.part(depth - 1)]
        else:
            parts = [getattr(self, kind)() for _ in range(2)]
        self.explicit = outer
        result = {'allOf': parts}
        if self.chance(0.2) and kind != 'part':
            result['type'] = {'map': 'object'}.get(kind, kind)
        return result

    def ref(self, depth):
        name = f'n{len(self.defs)}' + self.rng.choice(['', '/x', '~y', ' z', 'é', '%', '"'])
        self.defs[name] = None
        self.defs[name] = self.part(depth - 1)
        token = name.replace('~', '~0').replace('/', '~1')
        token = token.replace('%', '%25')
        if self.chance(0.5):
            token = token.replace(' ', '%20').replace('é', '%C3%A9').replace('"', '%22')
        return {'$ref': f'#/$defs/{token}'}

    def value(self, depth=1):
        kind = self.rng.randrange(8 if depth else 6)
        if kind == 0:
            return None
        if kind == 1:
            return self.chance(0.5)
        if kind in (2, 3):
            return self.number_value()
        if kind in (4, 5):
            return self.rng.choice(TEXTS)
        if kind == 6:
            return [self.value(0) for _ in range(self.rng.randint(0, 3))]
        names = self.rng.sample(NAMES + EXTRA, self.rng.randint(0, 2))
        return {name: self.value(0) for name in names}

    def example(self, schema, root):
        """Returns a value that is likely to be valid."""
        rng = self.rng
        if self.chance(0.07) or not isinstance(schema, dict):
            return self.value()
        if '$ref' in schema:
            name = schema['$ref'].removeprefix('#/$defs/')
            return self.example(root['$defs'][_unquoted(name)], root)
        for keyword in ('anyOf', 'oneOf', 'allOf'):
            if keyword in schema:
                return self.example(rng.choice(schema[keyword]), root)
        if 'const' in schema:
            return copy.deepcopy(schema['const'])
        if 'enum' in schema:
            return copy.deepcopy(rng.choice(schema['enum']))
        kind = schema.get('type')
        kind = rng.choice(kind) if isinstance(kind, list) else kind
        if kind in ('integer', 'number'):
            return self._number_near(schema, kind)
        if kind == 'string':
            return rng.choice(FORMAT_EXAMPLES.get(schema.get('format'), TEXTS))
        if kind == 'array':
            return self._array_near(schema, root)
        if kind == 'object':
            return self._object_near(schema, root)
        return {'null': None, 'boolean': self.chance(0.5)}.get(kind, self.value())

    def _number_near(self, schema, kind):
        ends = [v for k, v in schema.items() if 'imum' in k] or [self.number_value()]
        end = self.rng.choice(ends)
        near = [end, end + 1, end - 1, math.nextafter(end, math.inf), math.nextafter(end, -9e99)]
        value = self.rng.choice([*near, float(end), self.number_value()])
        whole = kind == 'integer' and self.chance(0.8) and abs(value) < 1e29
        return int(value) if whole else value

    def _array_near(self, schema, root):
        low = int(schema.get('minItems', 0))
        prefix = schema.get('prefixItems', [])
        count = low + self.rng.randint(0, 2)
        parts = [*prefix, *[schema.get('items', True)] * count][:count]
        return [self.example(part, root) for part in parts]

    def _object_near(self, schema, root):
        result = {}
        for name, part in schema.get('properties', {}).items():
            if name in schema.get('required', ()) or self.chance(0.5):
                result[name] = self.example(part, root)
        for name in schema.get('required', ()):
            if name not in result:
                result[name] = self.example(schema.get('additionalProperties', True), root)
        for pattern, part in schema.get('patternProperties', {}).items():
            matching = [name for name in EXTRA if re.search(pattern, name)]
            if matching and self.chance(0.5):
                result[self.rng.choice(matching)] = self.example(part, root)
        if schema.get('additionalProperties') is not False and self.chance(0.5):
            part = schema.get('additionalProperties', True)
            for name in self.rng.sample(EXTRA + NAMES, 2)[: self.rng.randint(0, 2)]:
                result.setdefault(name, self.example(part, root))
        return result


def _unquoted(token):
    import urllib.parse

    return urllib.parse.unquote(token).replace('~1', '/').replace('~0', '~')


def is_huge(value):
    """Returns whether a number has more digits than integers with bounds may have."""
    if isinstance(value, list):
        return any(map(is_huge, value))
    if isinstance(value, dict):
        return any(map(is_huge, value.values()))
    return isinstance(value, int | float) and abs(value) >= 1e29


def spellings(value, limit):
    """Returns the texts of a value, with every order of keys, and whole floats also as integers."""
    return itertools.islice(_spellings(value), limit)


def _spellings(value):
    if isinstance(value, float) and value.is_integer():
        yield str(int(value))
        yield json.dumps(value)
    elif isinstance(value, list):
        for items in itertools.product(*([*_spellings(item)] for item in value)):
            yield f'[{",".join(items)}]'
    elif isinstance(value, dict):
        for names in itertools.permutations(sorted(value, key=_rank)):
            for items in itertools.product(*([*_spellings(value[name])] for name in names)):
                keys = (json.dumps(name, ensure_ascii=False) for name in names)
                yield '{' + ','.join(f'{k}:{v}' for k, v in zip(keys, items, strict=True)) + '}'
    else:
        yield json.dumps(value, ensure_ascii=False)


def _rank(name):
    return NAMES.index(name) if name in NAMES else len(NAMES)


def distances(dfa):
    """Returns the minimum number of bytes from each state to an accepting state."""
    result = np.where(dfa.accepting, 0, 10**6)
    while True:
        shorter = np.minimum(result, 1 + result[dfa.table].min(axis=1))
        shorter[0] = 10**6
        if (shorter == result).all():
            return result
        result = shorter


def walk(dfa, rng, to_end, budget):
    """Returns a random accepted text, on the shortest path to an end after `budget` bytes."""
    state, text = 1, bytearray()
    while True:
        if dfa.accepting[state] and (len(text) >= budget or rng.random() < 0.1):
            return bytes(text)
        arrows = dfa.arrows[state]
        if not arrows:
            return bytes(text)
        if len(text) >= budget:
            arrows = [min(arrows, key=lambda arrow: to_end[arrow[2]])]
        low, high, state = rng.choice(arrows)
        text.append(rng.choice([low, high, rng.randint(low, high)]))
