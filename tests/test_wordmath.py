"""Tests the word problems: correctness, variety, bounds, reproducibility, disjoint splits."""

import collections
import itertools
import pickle
import re

import numpy as np
import pytest

from diffusiongemma.data.tasks import wordmath
from diffusiongemma.data.tasks.wordmath_templates import LEXICON, MAX_NUMBER, PEOPLE, apply


@pytest.fixture(scope='module')
def examples():
    return {split: [wordmath.generate(i, split) for i in range(4000)] for split in wordmath.SPLITS}


def _all(examples):
    return itertools.chain(*examples.values())


def test_every_template_appears_in_both_splits_about_equally_often(examples):
    names = {template.name for template in wordmath.TEMPLATES}
    assert len(names) == len(wordmath.TEMPLATES) >= 44
    for split in wordmath.SPLITS:
        counts = collections.Counter(example['template'] for example in examples[split])
        assert set(counts) == names
        assert max(counts.values()) < 2.5 * min(counts.values())


def test_problems_of_one_to_four_steps_are_about_equally_many():
    counts = collections.Counter(len(template.steps) for template in wordmath.TEMPLATES)
    assert set(counts) == {1, 2, 3, 4}
    assert max(counts.values()) - min(counts.values()) <= 2


def test_every_equation_holds_and_the_last_result_is_the_answer(examples):
    for example in _all(examples):
        response = example['response']
        equations = re.findall(r'(\d+) ([-+*/]) (\d+) = (\d+)', response)
        for left, op, right, result in equations:
            exact = {'+': int(left) + int(right), '-': int(left) - int(right)}
            exact |= {'*': int(left) * int(right), '/': int(left) / int(right or 1)}
            assert exact[op] == int(result), response
        assert equations[-1][3] == example['answer']
        assert response.endswith(f' The answer is {example["answer"]}.')
        assert response.count('=') == len(equations)
        assert wordmath.verify_steps(response)
        assert wordmath.check(response, example['answer'])


def test_all_numbers_and_factors_stay_within_the_documented_bounds(examples):
    for example in _all(examples):
        text = f'{example["prompt"]} {example["response"]}'
        # 1 is never printed, so every noun after a number is a plural.
        assert all(2 <= int(number) <= MAX_NUMBER for number in re.findall(r'\d+', text)), text
        for left, op, right in re.findall(r'(\d+) ([*/]) (\d+)', text):
            small, large = sorted((int(left), int(right)))
            if op == '*':
                assert small <= 9 and large <= 20, text
            else:
                assert 2 <= int(right) <= 9 and int(left) // int(right) <= 20, text


def test_texts_have_the_promised_lengths_and_no_unfilled_field(examples):
    for example in _all(examples):
        assert 15 <= len(example['response'].split()) <= 60
        assert 8 <= len(example['prompt'].split()) <= 55
        assert not re.search(r'[\[\]{}]|  | \.|None', example['prompt'] + example['response'])
        assert example['prompt'].endswith('?')


def test_pronouns_agree_with_the_only_person_of_a_problem(examples):
    by_name = {person.name: person for person in PEOPLE}
    checked = 0
    for example in _all(examples):
        words = re.findall(r'[A-Za-z]+', f'{example["prompt"]} {example["response"]}')
        people = {word for word in words if word in by_name}
        pronouns = {word.lower() for word in words} & {'he', 'she', 'his', 'her', 'him'}
        if len(people) == 1:
            person = by_name[people.pop()]
            assert pronouns <= {person.he, person.his, person.him}, example
            checked += bool(pronouns)
    assert checked > 500


def test_two_people_or_things_of_a_problem_differ():
    template = next(t for t in wordmath.TEMPLATES if t.name == 'three_friends_total')
    rng = np.random.default_rng(0)
    numbers = {'a': 10, 'b': 5, 'c': 3, 'x': 15, 'y': 12, 'z': 25, 'w': 37}
    names = {person.name for person in PEOPLE}
    for _ in range(200):
        words = set(re.findall(r'[A-Za-z]+', template.render(numbers, rng)['prompt']))
        assert len(words & names) == 3


def test_every_wording_and_every_word_of_the_lexicon_is_used(examples):
    prompts = collections.defaultdict(set)
    text = []
    for example in _all(examples):
        wording = re.sub(r'\d+', '', example['prompt'])
        prompts[example['template']].add(wording)
        text.append(example['prompt'])
    assert min(map(len, prompts.values())) > 2
    assert all(len(template.prompts) >= 2 for template in wordmath.TEMPLATES)
    words = set(re.findall(r'[A-Za-z]+', ' '.join(text)))
    missing = {str(word) for pool in LEXICON.values() for word in pool} - words
    assert not missing


def test_no_combination_of_template_and_numbers_is_in_both_splits(examples):
    def problems(split):  # the remaining text when all words are removed
        return {
            (
                e['template'],
                tuple(sorted(re.findall(r'\d+', e['prompt']))),
                tuple(re.findall(r'\d+', e['response'])),
            )
            for e in examples[split]
        }

    train, test = problems('train'), problems('test')
    assert min(len(train), len(test)) > 2000
    # A wording may show the same numbers in another order; the split depends on their meaning.
    assert not train & test


def test_the_split_depends_on_the_numbers_and_stays_what_it_was():
    splits = [wordmath.combination_split('share', {'q': q, 'k': 3}) for q in range(800)]
    assert 60 <= splits.count('test') <= 140
    reordered = wordmath.combination_split('share', {'k': 3, 'q': 5})
    assert reordered == wordmath.combination_split('share', {'q': 5, 'k': 3})


def test_every_template_has_at_least_200_combinations():
    rng = np.random.default_rng(0)
    for template in wordmath.TEMPLATES:
        found = set()
        for _ in range(5000):
            numbers = template.draw(rng)
            if numbers is not None:
                found.add(tuple(sorted(numbers.items())))
            if len(found) >= 200:
                break
        assert len(found) >= 200, template.name


def test_an_example_depends_only_on_seed_split_and_index():
    first = [wordmath.generate(i, 'train', seed=3) for i in (7, 8)]
    assert [wordmath.generate(i, 'train', seed=3) for i in (8, 7)] == first[::-1]
    assert wordmath.generate(7, 'train', seed=4) != first[0]
    assert wordmath.generate(7, 'test', seed=3) != first[0]


def test_the_stream_of_examples_is_the_one_that_was_released():
    example = wordmath.generate(0, 'train')
    assert example == {
        'prompt': (
            'Adam has 9 boxes with 14 peaches in each. He shares all the peaches '
            'equally among 7 friends. Noah is one of them and eats 9. How many '
            'peaches does Noah have left?'
        ),
        'response': (
            'The boxes hold 9 * 14 = 126 peaches. Each friend gets 126 / 7 = 18 '
            'peaches. After Noah eats 9, he has 18 - 9 = 9 peaches. The answer is '
            '9.'
        ),
        'answer': '9',
        'task': 'wordmath',
        'template': 'boxes_shared',
    }


def test_the_source_is_a_picklable_sequence():
    source = wordmath.Wordmath('test', size=5, seed=1)
    assert len(source) == 5
    assert source[2] == source[-3] == wordmath.generate(2, 'test', seed=1)
    assert source[np.int64(2)] == source[2]
    assert pickle.loads(pickle.dumps(source))[4] == source[4]
    assert list(source) == [source[i] for i in range(5)]
    for index in (5, -6):
        with pytest.raises(IndexError, match='out of range'):
            source[index]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'valid'"):
        wordmath.generate(0, 'valid')
    with pytest.raises(ValueError, match='index=-1'):
        wordmath.generate(-1, 'train')
    with pytest.raises(ValueError, match='size must be >= 1, got 0'):
        wordmath.Wordmath('train', size=0)
    with pytest.raises(ValueError, match="'dev'"):
        wordmath.Wordmath('dev', size=1)


@pytest.mark.parametrize(
    ('response', 'expected'),
    [
        ('So 3 + 4 = 7. The answer is 7.', True),
        ('The answer is 7', True),
        ('The answer is 8. No: The answer is 7.', True),
        ('The answer is 7. No: The answer is 8.', False),
        ('The answer is 70.', False),
        ('The answer is 7.5', False),
        ('The answer is -7.', False),
        ('the answer: 7', False),
        ('The answer is', False),
        ('', False),
        ('The answer is ' + '7' * 9999, False),
    ],
)
def test_check_takes_the_last_stated_answer(response, expected):
    assert wordmath.check(response, '7') is expected


@pytest.mark.parametrize(
    ('response', 'expected'),
    [
        ('She has 3 * 6 = 18 apples. Now 12 + 18 = 30.', True),
        ('She has 3 * 6 = 19 apples. Now 12 + 18 = 30.', False),
        ('So 2 + 3 * 4 = 14.', True),
        ('So 2 + 3 * 4 = 20.', False),
        ('So 2 + 3 = 4 + 1 = 5.', True),
        ('So 2 + 3 = 4 + 1 = 6.', False),
        ('So 7 / 2 = 3.', False),
        ('So 7 / 0 = 0.', False),
        ('So 3 - 5 = -2.', True),
        ('So ' + '9' * 9999 + ' + 1 = 2.', False),
        ('No equation at all.', False),
    ],
)
def test_verify_steps_evaluates_every_equation(response, expected):
    assert wordmath.verify_steps(response) is expected


def test_corrupting_any_number_of_an_equation_is_noticed(examples):
    for example in examples['test'][:300]:
        response = example['response']
        for match in re.finditer(r'\d+(?= [-+*/=])|(?<=[-+*/=] )\d+', response):
            wrong = f'{response[: match.start()]}{int(match[0]) + 1}{response[match.end() :]}'
            # x / 1-like accidents cannot occur: no operand is 0 or 1.
            assert not wordmath.verify_steps(wrong), wrong


@pytest.mark.parametrize(
    ('x', 'op', 'y', 'result'),
    [
        (150, '+', 50, 200),
        (150, '+', 51, None),
        (9, '-', 7, 2),
        (9, '-', 8, None),
        (20, '*', 9, 180),
        (10, '*', 10, None),
        (21, '*', 2, None),
        (40, '/', 2, 20),
        (42, '/', 2, None),
        (7, '/', 2, None),
        (20, '/', 10, None),
    ],
)
def test_apply_refuses_results_out_of_bounds(x, op, y, result):
    assert apply(x, op, y) == result
