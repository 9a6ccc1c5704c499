"""Tests automata of patterns, schemas and answers: their language, tokens and errors."""

import functools
import json
import re

import hypothesis
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import strategies as st

from diffusiongemma.constraints import automaton as fa
from diffusiongemma.constraints.automaton import DEAD, END, FREE, START
from diffusiongemma.constraints.grammar import from_json_schema, from_regex, from_texts
from diffusiongemma.constraints.json_schema import to_pattern
from diffusiongemma.constraints.posterior import condition
from diffusiongemma.constraints.regex import byte_automaton
from diffusiongemma.data.tokenizer import Tokenizer

PATTERNS = [
    'a|ab',
    '(a|ab)(c|bcd)',
    'a*?b+?c??',
    '(?:a(?:b|é)*){2,3}',
    '(a*)*b',
    '(|a){3}',
    r'[^a\n]{0,2}',
    r'.\.(?s:.)',
    r'^\d+(\.\d{1,2})?$',
    r'\w\W\s\S',
    r'(?a)\w\W\s\S\D',
    r'[\w-]+@[a-é]',
    r'[[a]&&b]',
    r'\x41\u20ac?[\U0001f600-\U0001f64f]',
    '(?x) a b # a comment',
    '[߿-ࠀ][\uffff-\U00010000][\x7f-\x80]',
    '(?P<name>a)(?:)|',
]
SCHEMA = {
    'type': 'object',
    'properties': {
        'k': {'type': 'string', 'enum': ['cat', 'dog', 'a "é"']},
        'a': {'type': 'integer'},
        'w': {'type': 'number'},
        't': {'type': 'boolean'},
        'l': {'type': 'array', 'items': {'type': 'string', 'maxLength': 2}, 'maxItems': 2},
        's': {'type': 'string', 'minLength': 1, 'maxLength': 4},
        'o': {
            'type': 'object',
            'properties': {
                'i': {'type': 'integer', 'minimum': -2, 'maximum': 12},
                'e': {'anyOf': [{'$ref': '#/$defs/e'}, {'const': 0}]},
            },
            'required': ['i'],
            'additionalProperties': False,
        },
    },
    'required': ['k', 'a', 'l', 'o'],
    '$defs': {'e': {'type': ['string', 'null'], 'maxLength': 2}},
}


@pytest.fixture(scope='module')
def tokenizer():
    return Tokenizer.load('builtin')


@functools.cache
def compiled(pattern):
    return byte_automaton(pattern, 20_000)


def matches(pattern, text):
    table, accepting = compiled(pattern)
    state = 1
    for byte in text.encode():
        state = table[state, byte]
    return bool(accepting[state])


@pytest.mark.filterwarnings('ignore:Possible nested set:FutureWarning')
@pytest.mark.parametrize('pattern', PATTERNS)
@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_a_pattern_matches_what_python_matches(pattern, data):
    characters = st.one_of(st.sampled_from('abcdé[]&-.1 \n\x1c@_'), st.characters(codec='utf-8'))
    anything = st.text(characters, max_size=6)
    text = data.draw(st.one_of(st.from_regex(pattern, fullmatch=True), anything))
    hypothesis.assume(not any(0xD800 <= ord(c) <= 0xDFFF for c in text))
    assert matches(pattern, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize('name', ['d', 'D', 's', 'S', 'w', 'W'])
@pytest.mark.parametrize('flag', ['', '(?a)'])
def test_classes_hold_the_same_characters_as_in_python(name, flag):
    points = [*range(0x3000), *range(0xFF00, 0x11000), *range(0x1D7C0, 0x1D810)]
    for character in map(chr, points):
        expected = bool(re.fullmatch(rf'{flag}\{name}', character))
        assert matches(rf'{flag}\{name}', character) == expected


@pytest.mark.parametrize(
    'pattern, message',
    [
        ('a(b', r"Invalid regular expression 'a\(b': missing \), .* at position 1"),
        ('[z-a]', 'bad character range z-a at position 1'),
        ('a(?=b)', 'has lookahead or lookbehind, which is not supported'),
        ('(?<!a)b', 'has negative lookahead or lookbehind'),
        (r'(a)\1', 'has a backreference'),
        (r'(a)?(?(1)b|c)', 'has a conditional group'),
        (r'a\b', 'has an anchor or word boundary inside the pattern'),
        ('a++', 'has a possessive quantifier'),
        ('(?>a)b', 'has an atomic group'),
        ('(?i)a', 'has the flag IGNORECASE'),
        (r'a[^\s\S]', 'matches no string'),
        ('(a|b)*a(a|b){12}', 'more than max_states=1000 states'),
        ('(?:){4294967294}', 'more than max_states=1000 states'),
        ('a{99999999999}', 'too large a count or too deep groups'),
        ('(' * 3000 + ')' * 3000, 'too large a count or too deep groups'),
        ('(((a{9}){9}){9}){9}', 'more than max_states=1000 states'),
    ],
)
def test_a_pattern_that_cannot_be_compiled_is_named(tokenizer, pattern, message):
    with pytest.raises(ValueError, match=message):
        from_regex(pattern, tokenizer, max_states=1000)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(), st.randoms(use_true_random=False))
def test_the_bytes_of_tokens_are_those_of_the_decoded_text(tokenizer, text, random):
    ids = tokenizer.encode(text)
    assert b''.join(map(tokenizer.token_bytes, ids)) == text.encode()
    pieces = [i for i in range(tokenizer.vocab_size) if not tokenizer.piece(i).startswith('<0x')]
    drawn = random.choices(pieces, k=8) + ids + random.choices(pieces, k=8)
    assert b''.join(map(tokenizer.token_bytes, drawn)).decode() == tokenizer.decode(drawn)


@pytest.mark.parametrize('answers', [['yes', 'no', ' yes or no'], ['', '▁ is no blank', 'é\n']])
def test_answers_are_accepted_in_any_spelling_and_nothing_else_is(tokenizer, answers):
    automaton = from_texts(answers, tokenizer)

    classes, next_states = map(np.asarray, (automaton.token_classes, automaton.next_states))

    def state_after(ids):
        return functools.reduce(lambda state, i: next_states[state, classes[i]], ids, START)

    for answer in answers:
        for stop in tokenizer.stop_ids:
            assert state_after([*tokenizer.encode(answer), stop]) == END
            by_byte = [tokenizer._byte_ids[byte] for byte in answer.encode()]
            assert state_after([*by_byte, stop]) == END
        assert state_after([*tokenizer.encode(answer + 'x'), tokenizer.eos_id]) == DEAD
        for special in tokenizer.special_ids - set(tokenizer.stop_ids):
            assert state_after([*tokenizer.encode(answer), special]) == DEAD
    for state in (END, FREE):
        assert (next_states[state, classes] == state).all()
    shortest = min(len(tokenizer.encode(answer)) for answer in answers) + 1
    assert automaton.min_tokens <= shortest


def test_tokens_beyond_the_tokenizers_are_never_allowed(tokenizer):
    automaton = from_regex('.*', tokenizer, vocab_size=tokenizer.vocab_size + 64)
    allowed = fa.allowed(automaton, jnp.array([START]), jnp.array([9]))[0]
    assert automaton.vocab_size == tokenizer.vocab_size + 64
    assert allowed[: tokenizer.vocab_size].sum() > 500 and not allowed[tokenizer.vocab_size :].any()
    with pytest.raises(ValueError, match='vocab_size=9 is less than the 1024 tokens'):
        from_regex('.*', tokenizer, vocab_size=9)


def test_other_stop_tokens_can_be_named(tokenizer):
    automaton = from_regex('a?', tokenizer, stop_ids=[tokenizer.pad_id])
    allowed = fa.allowed(automaton, jnp.array([START]), jnp.array([1]))[0]
    assert jnp.flatnonzero(allowed).tolist() == [tokenizer.pad_id]
    for stop_ids in ([], [-1], [1024]):
        with pytest.raises(ValueError, match=r'stop_ids must hold tokens in \[0, 1024\)'):
            from_regex('a?', tokenizer, stop_ids=stop_ids)


def test_a_vocabulary_that_cannot_spell_the_language_is_refused(tokenizer, monkeypatch):
    spelled = Tokenizer.token_bytes
    without = lambda self, i: spelled(self, i).replace(b'q', b'')  # noqa: E731
    monkeypatch.setattr(Tokenizer, 'token_bytes', without)
    assert from_regex('q|b', tokenizer).min_tokens == 2
    with pytest.raises(ValueError, match="No sequence of tokens of this vocabulary spells what 'q"):
        from_regex('qa+', tokenizer)


def test_a_tokenizer_that_drops_the_first_blank_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, 'decode', lambda self, ids: 'x')
    with pytest.raises(ValueError, match='drops the blank before a text'):
        from_regex('a', tokenizer)


def test_marginals_of_a_long_canvas_are_distributions(tokenizer):
    automaton = from_regex(r'("[^"]*",)*', tokenizer)
    logits = 20 * jax.random.normal(jax.random.key(0), (2, 256, automaton.vocab_size))
    run = jax.jit(lambda *x: condition(automaton, *x).log_marginals())
    log_marginals = run(logits, jnp.array([START, START]), jnp.array([256, 1000]))
    sums = np.exp(np.asarray(log_marginals, np.float64)).sum(axis=-1)
    np.testing.assert_allclose(sums, 1.0, atol=1e-4)


def generate(automaton, rows, canvas_length, max_tokens, seed, greedy=False):
    """Generates canvas after canvas from random logits, like a sampler without a model."""

    def next_canvas(states, inputs):
        key, remaining = inputs
        logit_key, draw_key = jax.random.split(key)
        logits = table[jax.random.randint(logit_key, (rows, canvas_length), 0, len(table))]
        posterior = condition(automaton, logits, states, jnp.full(rows, remaining))
        keys = jax.random.split(draw_key, rows)
        canvas = posterior.most_likely() if greedy else posterior.draw(keys)
        states = fa.advance(automaton, states, canvas, jnp.full(rows, canvas_length))
        return states, (canvas, posterior.feasible)

    table = 4 * jax.random.normal(jax.random.key(seed), (256, automaton.vocab_size))
    remaining = jnp.arange(max_tokens, 0, -canvas_length)
    keys = jax.random.split(jax.random.key(seed + 1), len(remaining))
    run = jax.jit(lambda: jax.lax.scan(next_canvas, jnp.full(rows, START), (keys, remaining)))
    states, (canvases, feasible) = run()
    assert (states == END).all() and feasible.all()
    return np.asarray(jnp.concatenate(canvases, axis=1))


def texts(tokenizer, tokens, max_tokens):
    for row in tokens:
        stops = np.flatnonzero(np.isin(row, tokenizer.stop_ids))
        assert stops.size and stops[0] < max_tokens
        assert not set(row[: stops[0]].tolist()) & tokenizer.special_ids
        yield tokenizer.decode(row[: stops[0]].tolist())


@pytest.mark.slow
@pytest.mark.parametrize('greedy', [False, True])
def test_a_thousand_responses_of_random_logits_are_valid_json(tokenizer, greedy):
    automaton = from_json_schema(SCHEMA, tokenizer)
    max_tokens = 48
    validator = jsonschema.Draft202012Validator(SCHEMA)
    tokens = generate(automaton, 500, 16, max_tokens, seed=0, greedy=greedy)
    found = list(texts(tokenizer, tokens, max_tokens))
    for text in found:
        validator.validate(json.loads(text))
    assert len(set(found)) > 400


def test_responses_of_random_logits_match_their_pattern(tokenizer):
    pattern = r'(\+\d{1,3} )?\(\d{3}\) \d{3}-\d{4}|none, |[^a-z]{0,3}é'
    tokens = generate(from_regex(pattern, tokenizer), 100, 8, 20, seed=0)
    found = list(texts(tokenizer, tokens, 20))
    assert all(re.fullmatch(pattern, text) for text in found)
    assert len(set(found)) > 20


VALUES = [
    *({}, [], '', 0, -7, 500, 501, 1.5, -2e-3, True, None, 'cat', 'é "\\\n', 'abcdef', 'abcdefg'),
    *([1], [1, 2, 3], [1, 2, 3, 4], ['a'], {'a': 1}, {'b': None}, {'a': 1, 'b': None}, {'c': 1}),
]


@pytest.mark.parametrize(
    'schema',
    [
        {'type': 'null'},
        {'type': 'boolean'},
        {'type': 'integer'},
        {'type': 'integer', 'minimum': -7, 'maximum': 500},
        {'type': 'number'},
        {'type': 'string'},
        {'type': 'string', 'minLength': 1, 'maxLength': 6},
        {'type': ['string', 'null', 'integer']},
        {'type': 'array', 'items': {'type': 'integer'}},
        {'type': 'array', 'items': {'type': 'integer'}, 'minItems': 1, 'maxItems': 3},
        {'type': 'array', 'items': {'type': 'integer'}, 'minItems': 2},
        {'type': 'array', 'maxItems': 0},
        {'enum': [1, 'cat', None, [1], {'a': 1}]},
        {'enum': ['cat', 0, True], 'type': ['integer', 'boolean']},
        {'const': 'é "\\\n', 'title': 'a title'},
        {'anyOf': [{'type': 'null'}, {'type': 'array', 'items': {'type': 'string'}}]},
        {'allOf': [{'$ref': '#/$defs/a~1b'}], '$defs': {'a/b': {'type': 'integer'}}},
        *(
            {
                'type': 'object',
                'properties': {'a': {'type': 'integer'}, 'b': {'type': 'null'}},
                'additionalProperties': False,
                'required': required,
            }
            for required in ([], ['a'], ['b'], ['a', 'b'])
        ),
        {'type': 'object', 'additionalProperties': False},
    ],
)
@pytest.mark.parametrize('separators', [(',', ':'), (', ', ': ')])
def test_a_schema_accepts_the_values_that_are_valid(schema, separators):
    pattern = to_pattern(schema, separators)
    validator = jsonschema.Draft202012Validator(schema)
    for value in VALUES:
        text = json.dumps(value, ensure_ascii=False, separators=separators)
        assert bool(re.fullmatch(pattern, text)) == validator.is_valid(value), text


@pytest.mark.parametrize('present', range(2**5))
@pytest.mark.parametrize('required', [[], ['b'], ['c', 'd'], list('abcde')])
def test_any_optional_members_may_be_missing(present, required):
    names = [name for i, name in enumerate('abcde') if present >> i & 1]
    schema = {
        'type': 'object',
        'properties': {name: {'type': 'null'} for name in 'abcde'},
        'required': required,
    }
    text = json.dumps(dict.fromkeys(names), separators=(',', ':'))
    assert bool(re.fullmatch(to_pattern(schema), text)) == (set(required) <= set(names))


@pytest.mark.parametrize(
    'schema, message',
    [
        (False, 'No value is valid under the schema at #: its keywords contradict each other'),
        (3, 'The schema at # must be an object or a boolean, got 3'),
        ({'type': 'text'}, "type at # must be one of null, .*, or a list of them, got 'text'"),
        ({'type': []}, 'type at # must be one of'),
        ({'type': 'string', 'format': 'x'}, "format='x' at # is not supported here: known are"),
        ({'multipleOf': 0.1}, 'multipleOf=0.1 at # is not supported here: only whole divisors'),
        (
            {'type': 'integer', 'minimum': 2, 'maximum': 1},
            'No value is valid under the schema at #',
        ),
        ({'type': 'integer', 'minimum': 1e300}, 'a bound at # is not supported here: .* 30 digits'),
        ({'oneOf': [{'type': 'null'}, {}]}, 'alternatives 0 and 1 may hold for one value. Use any'),
        ({'oneOf': [{'type': 'integer'}, {'type': 'number'}]}, 'may hold for one value'),
        ({'type': 'string', 'minLength': 3, 'maxLength': 2}, 'No value is valid'),
        ({'enum': ['a'], 'type': 'null'}, 'No value is valid'),
        ({'$ref': '#/$defs/x'}, "reference '#/\\$defs/x' at # leads nowhere: # has no '\\$defs'"),
        ({'$ref': '#/type', 'type': 'null'}, 'The schema at #/type must be an object or a boolean'),
        ({'$ref': 'http://a/b'}, 'is not local. Copy what it names into \\$defs'),
        ({'$ref': '#name'}, 'names an anchor, which is not supported'),
        ({'$ref': '#/$defs/~2', '$defs': {'~2': {}}}, 'leads nowhere'),
        ({'$ref': '#'}, "The reference '#' at # is recursive, which no finite automaton can hold"),
        ({'type': 'array', 'items': {'$ref': '#'}}, "The reference '#' at #/items is recursive"),
        ({'properties': {'a/b': {'not': {}}}}, "The keyword 'not' at #/properties/a~1b is not sup"),
        ({'type': 'string', 'nullable': True}, "'nullable' at # .* add 'null' to the type instead"),
        ({'items': [{}]}, r'items at # must be a schema, got \[\{\}\]. Write prefixItems'),
        ({'const': [1], 'items': {'not': {}}}, "The keyword 'not' at #/items is not supported"),
        ({'const': ['a'], 'items': {'pattern': '('}}, 'At #/items/pattern: Invalid'),
        ({'const': {'a': 1}, 'properties': {'a': 3}}, 'The schema at #/properties/a must be'),
        ({'minLength': 1.5}, 'minLength at # must be a whole number >= 0, got 1.5'),
        ({'minimum': True}, 'minimum at # must be a number, got True'),
        ({'exclusiveMinimum': True}, 'exclusiveMinimum at # must be a number'),
        ({'const': float('nan')}, 'The schema is not valid JSON: Out of range float'),
        ({'const': {1, 2}}, 'The schema is not valid JSON: Object of type set'),
        ({'const': '\ud800'}, 'half of a surrogate pair'),
        ({'pattern': '(a'}, r"At #/pattern: Invalid regular expression '\(a'"),
        ({'pattern': '(?=a)'}, 'At #/pattern: .* has lookahead'),
        ({'patternProperties': {'(?i)a': {}}}, 'At #/patternProperties: .* IGNORECASE'),
        ({'type': 'array', 'uniqueItems': True}, 'uniqueItems at # is not supported here'),
        ({'maxLength': 99999}, 'more than max_states=20000 states. Lower maxLength=99999 at #'),
        ({'type': 'object', 'minProperties': 2}, 'minProperties at # is not supported here'),
        (functools.reduce(lambda x, _: {'items': x}, range(3000), {}), 'nested too deeply'),
    ],
)
def test_a_schema_that_is_not_supported_is_named(tokenizer, schema, message):
    with pytest.raises(ValueError, match=message):
        from_json_schema(schema, tokenizer)


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '{"const": 1e999}', '1' * 5000])
def test_a_text_that_is_no_schema_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match='The schema'):
        from_json_schema(text, tokenizer)


def test_separators_must_make_json(tokenizer):
    with pytest.raises(ValueError, match='do not make valid JSON'):
        from_json_schema(True, tokenizer, separators=(';', ':'))


def test_a_schema_may_be_text(tokenizer):
    automaton = from_json_schema('{"const": "a b"}', tokenizer)
    ids = tokenizer.encode('"a b"')
    path = fa.trace(automaton, jnp.array([START]), jnp.array([[*ids, tokenizer.turn_end_id]]))
    assert path[0, -1] == END


def test_no_answers_are_refused(tokenizer):
    with pytest.raises(ValueError, match='No answers to choose from'):
        from_texts([], tokenizer)
