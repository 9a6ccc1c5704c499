"""Tests stage 0: the teacher's answers, and that each is written once after interruptions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_params import new_params

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data import target_files
from diffusiongemma.data.packing import TEACHER_KEYS, RowLayout, pack_examples, tokenize
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation import answers, targets
from diffusiongemma.distillation.comparison import check_room
from diffusiongemma.distillation.targets import TargetsConfig, write_targets
from diffusiongemma.models import Gemma
from diffusiongemma.parallel import make_mesh
from diffusiongemma.sampling import Sampler, SamplingConfig

WORDMATH = {'kind': 'wordmath', 'size': 6}


@pytest.fixture
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def random_teacher(tiny_config):
    """Returns a random model, its parameters and tokenizer; its answers rarely end."""
    tokenizer = Tokenizer.load('builtin')
    model = Gemma(
        tiny_config.replace(
            vocab_size=tokenizer.vocab_size, canvas_length=0, layer_types=('full', 'full')
        )
    )
    return model, new_params(model), tokenizer


@pytest.fixture(scope='module')
def teacher():
    return load_model('builtin-teacher')


def given(source, **changes):
    """Returns targets with the responses of the source, so that a random teacher suffices."""
    settings = {'batch_size': 2, 'top_k_logits': 3, 'sequence_level': False}
    return TargetsConfig(source, **settings | changes)


def jsonl(path, *prompts):
    rows = [{'prompt': prompt, 'response': f'Yes, {prompt}.'} for prompt in prompts]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return DataSpec(kind='jsonl', path=str(path))


def examples(spec):
    source = load_source(spec)
    return [source[i] for i in range(len(source))]


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in Path(directory).rglob('*')
        if path.is_file()
    }


@pytest.mark.slow
def test_answers_are_the_same_on_eight_devices_and_are_written_once(
    teacher, one_device, tmp_path, monkeypatch
):
    config = TargetsConfig(WORDMATH | {'size': 4}, batch_size=4, max_new_tokens=96, top_k_logits=4)
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    spec = write_targets(*teacher, config, tmp_path / 'eight', mesh, seed=0)
    alone = write_targets(*teacher, config, tmp_path / 'one', one_device, seed=0)
    assert spec.name == alone.name
    found, expected = examples(spec), examples(alone)
    assert 0 < len(found) <= 4
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[name] for name in ('index', 'prompt', 'response')] == [
            theirs[name] for name in ('index', 'prompt', 'response')
        ]
        np.testing.assert_allclose(
            np.exp(ours['teacher_log_probs'].astype(np.float32)),
            np.exp(theirs['teacher_log_probs'].astype(np.float32)),
            atol=2e-3,
        )
        # Each token of a greedy answer is the most likely one after the previous tokens.
        document = tokenize(ours, teacher[2])
        np.testing.assert_array_equal(ours['teacher_ids'][:, 0], document.response)

    written = contents(tmp_path / 'eight')
    monkeypatch.setattr(targets, 'Answerer', None)  # not needed again
    assert write_targets(*teacher, config, tmp_path / 'eight', mesh, seed=0) == spec
    assert contents(tmp_path / 'eight') == written


@pytest.mark.slow
def test_the_stored_tokens_are_the_likeliest_of_a_causal_pass(random_teacher, one_device, tmp_path):
    model, params, tokenizer = random_teacher
    spec = write_targets(*random_teacher, given(WORDMATH), tmp_path, one_device, seed=0)
    rows = examples(spec)
    assert [row['index'] for row in rows] == list(range(6))
    for row in (rows[0], rows[5]):
        document = tokenize(row, tokenizer)
        tokens = jnp.asarray(document.tokens)[None]
        logits = model.apply({'params': params}, tokens)[0]  # [T, V]
        probs = jax.nn.softmax(logits[document.prompt_length - 1 : -1])
        most_likely, ids = jax.lax.top_k(probs, 3)
        np.testing.assert_array_equal(row['teacher_ids'], ids)
        np.testing.assert_allclose(np.exp(row['teacher_log_probs']), most_likely, rtol=0.01)
        np.testing.assert_allclose(
            np.exp(row['teacher_log_rest'].astype(np.float32)), 1 - most_likely.sum(-1), rtol=1e-3
        )


class _DyingWriter(target_files.ArrayRecordWriter):
    """A writer that raises an error after five examples, as if the process were killed."""

    written = 0

    def write(self, record):
        _DyingWriter.written += 1
        if _DyingWriter.written > 5:
            raise KeyboardInterrupt
        super().write(record)


def test_an_interrupted_call_goes_on_to_the_same_files(
    random_teacher, one_device, tmp_path, monkeypatch
):
    monkeypatch.setattr(targets, 'SHARD_SIZE', 3)
    config = given(WORDMATH | {'size': 8})
    write_targets(*random_teacher, config, tmp_path / 'whole', one_device, seed=0)
    cut = tmp_path / 'cut'
    with monkeypatch.context() as patch:
        patch.setattr(target_files, 'ArrayRecordWriter', _DyingWriter)
        with pytest.raises(KeyboardInterrupt):
            write_targets(*random_teacher, config, cut, one_device, seed=0)
    (first,) = cut.rglob('targets_*-00000-of-00003')
    before = first.stat().st_mtime_ns
    assert not list(cut.rglob('targets_*-00001-of-00003')) and not (cut / 'counts.json').exists()
    answered = []
    answer = answers.Answerer.__call__
    monkeypatch.setattr(
        answers.Answerer,
        '__call__',
        lambda self, indices, rows: (answered.extend(indices), answer(self, indices, rows))[1],
    )
    write_targets(*random_teacher, config, cut, one_device, seed=0)
    assert answered == [3, 4, 5, 6, 7]
    assert first.stat().st_mtime_ns == before
    assert contents(cut) == contents(tmp_path / 'whole')


def test_a_prompt_that_comes_twice_is_answered_once_and_one_without_room_never(
    teacher, one_device, tmp_path
):
    task = load_source(DataSpec(kind='wordmath', size=2))
    prompts = [task[0]['prompt'], task[1]['prompt'], task[0]['prompt'], 'word ' * 400]
    config = TargetsConfig(
        jsonl(tmp_path / 'prompts.jsonl', *prompts), batch_size=4, max_new_tokens=96
    )
    spec = write_targets(*teacher, config, tmp_path / 'out', one_device, seed=0)
    counts = json.loads((tmp_path / 'out' / 'counts.json').read_text())
    assert counts['prompts'] == 4 and counts['duplicates'] == 1
    assert counts['answers'] == 2 and counts['left_out'] == 1
    assert [row['index'] for row in examples(spec)] == [0, 1]


def test_targets_that_were_made_otherwise_are_refused(random_teacher, one_device, tmp_path):
    model, params, tokenizer = random_teacher
    source = jsonl(tmp_path / 'prompts.jsonl', 'one', 'two')
    out = tmp_path / 'out'

    def write(params=params, source=source, seed=0, **changes):
        return write_targets(
            model, params, tokenizer, given(source, **changes), out, one_device, seed=seed
        )

    write()
    write(batch_size=1)  # it does not change the written targets
    with pytest.raises(ValueError, match='made with another seed'):
        write(seed=1)
    with pytest.raises(ValueError, match='made with another top_k_logits; use another workdir'):
        write(top_k_logits=2)
    with pytest.raises(ValueError, match='made with another teacher'):
        write(params=jax.tree.map(lambda leaf: leaf + 1, params))
    with pytest.raises(ValueError, match='made with another prompts'):
        write(source=jsonl(tmp_path / 'prompts.jsonl', 'one', 'three'))


def test_answers_that_leave_no_room_for_a_prompt_are_refused(random_teacher, one_device, tmp_path):
    model, params, tokenizer = random_teacher
    short = model.clone(config=model.config.replace(max_positions=32))
    config = given(WORDMATH, max_new_tokens=32, sequence_level=True)
    with pytest.raises(
        ValueError, match='targets.max_new_tokens=32 leaves no room for a prompt in'
    ):
        write_targets(short, params, tokenizer, config, tmp_path / 'a', one_device, seed=0)
    assert not (tmp_path / 'a').exists()
    sampling = SamplingConfig(max_new_tokens=32)
    with pytest.raises(ValueError, match='sampling.max_new_tokens=32 leaves no room .* 32 positi'):
        check_room(Sampler(short, sampling, 'autoregressive'))


def test_what_can_not_be_is_said_before_anything_is_answered(random_teacher, one_device, tmp_path):
    with pytest.raises(ValueError, match='top_k_logits=2000 is more than the 1024 tokens'):
        config = given(WORDMATH, top_k_logits=2000)
        write_targets(*random_teacher, config, tmp_path / 'a', one_device, seed=0)
    with pytest.raises(ValueError, match='batch_size=2 is not divisible by data x fsdp'):
        mesh = make_mesh({'data': 8})
        write_targets(*random_teacher, given(WORDMATH), tmp_path / 'b', mesh, seed=0)
    with pytest.raises(ValueError, match='top_k_logits must be >= 0, got -1'):
        given(WORDMATH, top_k_logits=-1)


def test_answers_that_do_not_end_are_left_out(random_teacher, one_device, tmp_path):
    config = TargetsConfig(WORDMATH, batch_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match='no answer of the teacher ended within'):
        write_targets(*random_teacher, config, tmp_path, one_device, seed=0)


@pytest.mark.slow
def test_answers_that_do_not_end_can_be_kept_as_the_tokens_that_they_are(
    random_teacher, one_device, tmp_path
):
    model, params, tokenizer = random_teacher
    config = TargetsConfig(WORDMATH, batch_size=4, max_new_tokens=3, keep_unfinished=True)
    spec = write_targets(*random_teacher, config, tmp_path / 'out', one_device, seed=0)
    rows = examples(spec)
    assert len(rows) == 6
    for row in rows:
        prompt = tokenizer.format_prompt(row['prompt'])
        document = tokenize(row, tokenizer)
        assert len(row['response_ids']) == 3  # no stop token after them
        np.testing.assert_array_equal(document.response, row['response_ids'])
        # Each token is the greedy one after the previous tokens.
        logits = model.apply({'params': params}, document.tokens[None])[0]
        expected = np.argmax(logits[len(prompt) - 1 : -1], axis=-1)
        np.testing.assert_array_equal(document.response, expected)
        assert tokenizer.decode(row['response_ids'].tolist()) == row['response']
    message = 'made with another keep_unfinished'
    with pytest.raises(ValueError, match=message):
        plain = TargetsConfig(WORDMATH, batch_size=4, max_new_tokens=3)
        write_targets(*random_teacher, plain, tmp_path / 'out', one_device, seed=0)


def test_documents_longer_than_the_teachers_are_left_out(random_teacher, one_device, tmp_path):
    model, params, tokenizer = random_teacher
    model = Gemma(model.config.replace(max_positions=40))
    source = jsonl(tmp_path / 'prompts.jsonl', 'one', 'word ' * 60, 'two')
    out = tmp_path / 'out'
    write_targets(model, params, tokenizer, given(source), out, one_device, seed=0)
    counts = json.loads((out / 'counts.json').read_text())
    assert (counts['answers'], counts['left_out']) == (2, 1)


def test_a_packed_row_has_what_the_teacher_said_where_a_causal_pass_would_say_it():
    tokenizer = Tokenizer.load('builtin')
    layout = RowLayout(row_length=128, canvases_per_row=4, canvas_length=16, top_k=2)
    rows = []
    for prompt, response in (('one', 'first answer'), ('two', 'second'), ('three', '3rd')):
        row = {'prompt': prompt, 'response': response}
        tokens = tokenize(row, tokenizer).response
        rows.append(
            row
            | {
                'teacher_ids': np.stack([tokens, tokens + 1], axis=1),
                'teacher_log_probs': np.zeros((len(tokens), 2), np.float16),
                'teacher_log_rest': np.arange(len(tokens), dtype=np.float16),
            }
        )
    batch = pack_examples(rows, tokenizer, layout)
    before_target = np.roll(batch['target_mask'], -1, axis=1)
    ids = batch['teacher_ids'][before_target]
    np.testing.assert_array_equal(ids[:, 0], batch['tokens'][batch['target_mask']])
    np.testing.assert_array_equal(ids[:, 1], ids[:, 0] + 1)
    assert not any(batch[name][~before_target].any() for name in TEACHER_KEYS)
    assert batch['teacher_log_probs'].dtype == np.float16

    with pytest.raises(ValueError, match='the data hold no distributions of the teacher'):
        pack_examples([{'prompt': 'one', 'response': 'two'}], tokenizer, layout)
    with pytest.raises(ValueError, match=r'\[tokens, k\] = \(\d+, 2\) .* \(\d+, 3\) are needed'):
        pack_examples(rows, tokenizer, RowLayout(128, 4, 16, top_k=3))
