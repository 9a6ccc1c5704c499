"""Tests JSONL files, data specs, packing, and the resumable stream of batches."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import pickle
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src import xla_bridge

from diffusiongemma.data.jsonl import JsonlSource
from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.data.pipeline import eval_examples, make_train_iterator
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tokenizer import Tokenizer


class Letters:
    """A tokenizer with one token per letter, whose responses end with token 1."""

    pad_id = 0

    def format_prompt(self, prompt):
        return [ord(letter) for letter in prompt]

    def format_response(self, response):
        return [ord(letter) for letter in response] + [1]


def write_rows(path, *rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return DataSpec(kind='jsonl', path=str(path))


def test_jsonl_rows_come_back_in_order_with_their_other_keys(tmp_path):
    spec = write_rows(
        tmp_path / 'a.jsonl',
        {'prompt': 'p', 'response': 'r', 'id': 3},
        {'prompt': 'q', 'response': 's'},
    )
    assert eval_examples(spec) == [
        {'prompt': 'p', 'response': 'r', 'id': 3},
        {'prompt': 'q', 'response': 's'},
    ]


def test_jsonl_features_may_have_other_names(tmp_path):
    write_rows(tmp_path / 'a.jsonl', {'q': 'two?', 'a': 'yes'})
    spec = DataSpec(
        kind='jsonl', path=str(tmp_path / 'a.jsonl'), prompt_feature='q', response_feature='a'
    )
    assert load_source(spec)[0] == {'prompt': 'two?', 'response': 'yes'}


@pytest.mark.parametrize(
    ('second_line', 'message'),
    [
        ('{"prompt": "p"}', r'a.jsonl.*2.*missing "response"'),
        ('{"prompt": "p", ', r'a.jsonl.*2.*invalid JSON'),
        ('[1]', r'a.jsonl.*2.*expected an object'),
        ('{"prompt": "p", "response": 4}', r'a.jsonl.*2.*"response" must be a string'),
    ],
)
def test_a_bad_jsonl_row_is_named_by_its_line(tmp_path, second_line, message):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"prompt": "p", "response": "r"}\n' + second_line + '\n')
    with pytest.raises(ValueError, match=message):
        load_source(DataSpec(kind='jsonl', path=str(path)))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    rows = b'{"prompt": "a", "response": "b"}\n\xef\xbb\xbf\n{"prompt": "c", "response": "d"}\n'
    (tmp_path / 'plain.jsonl').write_bytes(rows)
    (tmp_path / 'marked.jsonl').write_bytes(b'\xef\xbb\xbf' + rows)
    plain, marked = (JsonlSource(tmp_path / f'{name}.jsonl') for name in ('plain', 'marked'))
    assert [marked[i] for i in range(2)] == [plain[i] for i in range(2)]
    assert len(marked) == 2 and marked.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    'convert',
    [
        gzip.compress,
        lambda data: (
            gzip.compress(data[:20]) + gzip.compress(data[20:])
        ),  # as written by `cat a.gz b.gz`
        lambda data: data.decode().encode('utf-16'),
        lambda data: b'\xfe\xff' + data.decode().encode('utf-16-be'),
        lambda data: gzip.compress(data.decode().encode('utf-16')),
    ],
)
def test_gzip_and_utf16_are_read_as_the_same_text(tmp_path, convert):
    first = '{"prompt": "ä 漢\\n", "response": "\U0001f34e\u2028b"}'
    rows = f'{first}\r\n\n{{"prompt": "c", "response": "d"}}'.encode()
    (tmp_path / 'plain.jsonl').write_bytes(rows)
    (tmp_path / 'other').write_bytes(convert(rows))
    plain, other = JsonlSource(tmp_path / 'plain.jsonl'), JsonlSource(tmp_path / 'other')
    assert len(other) == 2 and plain[0]['response'] == '\U0001f34e\u2028b'
    for source in (other, pickle.loads(pickle.dumps(other))):
        assert [source[i] for i in range(2)] == [plain[i] for i in range(2)]
    assert other.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ('convert', 'message'),
    [
        (bz2.compress, 'bunzip2'),
        (lzma.compress, 'unxz'),
        (lambda data: gzip.compress(data)[:-9], 'is a damaged gzip file .*; copy it again'),
        (lambda data: gzip.compress(data)[:-8] + b'12345678', 'is a damaged gzip file'),
        (lambda data: data.decode().encode('utf-16') + b'"', 'begins as UTF-16 .*save it as UTF-8'),
        (lambda data: gzip.compress(bz2.compress(data)), 'line 1: the text is not UTF-8'),
        (lambda data: data.decode().encode('utf-16-le'), 'may be UTF-16; save the file as UTF-8'),
        (lambda data: data.replace(b'p', b'\xe9'), 'line 1: the text is not UTF-8'),
    ],
)
def test_a_jsonl_file_in_another_form_is_an_error_that_says_what_to_do(tmp_path, convert, message):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(convert(b'{"prompt": "p", "response": "r"}\n'))
    with pytest.raises(ValueError, match=f'a.jsonl.*{message}'):
        JsonlSource(path)


def test_an_empty_jsonl_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='empty'):
        load_source(write_rows(tmp_path / 'a.jsonl'))


def test_a_missing_jsonl_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.jsonl'):
        load_source(DataSpec(kind='jsonl', path=str(tmp_path / 'nowhere.jsonl')))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'kind': 'wordmaths'}, "did you mean 'wordmath'"),
        ({'kind': 'wordmath', 'sede': 1}, "did you mean 'seed'"),
        ({'kind': 'jsonl'}, "needs 'path'"),
        ({'kind': 'wordmath', 'size': 0}, 'size must be an integer >= 1'),
        ({'kind': 'wordmath', 'path': 'x'}, r"no use for \['path'\]"),
        ({'split': 'train'}, "needs 'kind'"),
    ],
)
def test_a_bad_data_spec_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        DataSpec.from_config(config)


LAYOUT = RowLayout(row_length=24, canvases_per_row=6, canvas_length=4)
texts = st.text('abcdefgh', min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=12))
def test_packing_keeps_every_document_whole_and_cuts_its_response_in_canvases(pairs):
    examples = [{'prompt': prompt, 'response': response} for prompt, response in pairs]
    batch = pack_examples(examples, Letters(), LAYOUT)
    found, found_canvases = [], []
    for row in range(len(batch['tokens'])):
        segments = batch['segment_ids'][row]
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            assert (np.diff(where) == 1).all()
            np.testing.assert_array_equal(batch['positions'][row, where], range(len(where)))
            tokens = batch['tokens'][row, where].tolist()
            is_target = batch['target_mask'][row, where]
            assert (np.diff(is_target.astype(int)) >= 0).all()  # the prompt, then the response
            found.append(tokens)
            response = tokens[int(np.argmax(is_target)) :]
            canvases = np.flatnonzero(batch['canvas_segment_ids'][row] == segment)
            joined = batch['canvas_tokens'][row, canvases].reshape(-1).tolist()
            assert joined[: len(response)] == response
            assert set(joined[len(response) :]) <= {0} and len(joined) - len(response) < 4
            for canvas in canvases:
                offset, start = (
                    batch[name][row, canvas] for name in ('canvas_offsets', 'canvas_starts')
                )
                assert where[start] == offset
                assert batch['tokens'][row, offset] == batch['canvas_tokens'][row, canvas, 0]
            found_canvases.append(response)
        assert not batch['target_mask'][row, segments == 0].any()
    letters = Letters()
    wanted = [letters.format_prompt(p) + letters.format_response(r) for p, r in pairs]
    assert sorted(found) == sorted(wanted)
    assert sorted(found_canvases) == sorted(letters.format_response(r) for _, r in pairs)


def test_a_document_that_fits_no_row_is_dropped_whole():
    examples = [{'prompt': 'a' * 30, 'response': 'b'}, {'prompt': 'c', 'response': 'd'}]
    batch = pack_examples(examples, Letters(), LAYOUT)
    assert batch['tokens'][0, :3].tolist() == [ord('c'), ord('d'), 1]
    assert batch['segment_ids'].max() == 1
    with pytest.raises(ValueError, match='No example fits'):
        pack_examples(examples[:1], Letters(), LAYOUT)


def stream(**changes):
    sizes = {'batch_size': 2, 'row_length': 256, 'canvases_per_row': 8, 'canvas_length': 32}
    sources = changes.pop('sources', DataSpec(kind='wordmath', size=300))
    arguments = sizes | {'seed': 3} | changes
    return make_train_iterator(sources, Tokenizer.load('builtin'), **arguments)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_stream_is_a_function_of_its_arguments():
    first, second, other = stream(), stream(), stream(seed=4)
    batch = next(first)
    assert_same(batch, next(second))
    assert not np.array_equal(batch['tokens'], next(other)['tokens'])


def test_a_stream_goes_on_where_its_state_was_taken():
    first = stream()
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    wanted = [next(first) for _ in range(4)]
    resumed = stream()
    resumed.set_state(state)
    for batch in wanted:
        assert_same(batch, next(resumed))


def test_the_state_of_another_stream_is_refused():
    with pytest.raises(ValueError, match='seed: saved 3, now 4'):
        stream(seed=4).set_state(stream().get_state())


@pytest.mark.slow
def test_two_workers_make_the_same_stream_again_and_go_on_where_its_state_was_taken():
    with closing(stream(workers=2)) as first:
        start = [next(first) for _ in range(3)]
        state = json.dumps(first.get_state())
        wanted = [next(first) for _ in range(3)]
        first.set_state(json.loads(state))
        assert_same(wanted[0], next(first))
    with closing(stream(workers=2)) as resumed:
        resumed.set_state(json.loads(state))
        for batch in wanted:
            assert_same(batch, next(resumed))
    with closing(stream(workers=2)) as again:
        for batch in start:
            assert_same(batch, next(again))
    del first, resumed, again  # older versions of grain end their processes with the iterator
    assert not multiprocessing.active_children()


def test_workers_are_part_of_a_streams_settings_where_there_are_any():
    assert 'workers' not in stream().get_state()['fingerprint']  # as in states of older versions
    with pytest.raises(ValueError, match='workers: saved None, now 2'):
        stream(workers=2).set_state(stream().get_state())
    with pytest.raises(ValueError, match='workers must be >= 0, got -1'):
        stream(workers=-1)


class Marked:
    """A source of equal examples."""

    def __init__(self, letter, size=50):
        self._example = {'prompt': letter, 'response': letter}
        self._size = size

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        return self._example


def test_sources_are_mixed_by_weight():
    batches = make_train_iterator(
        [Marked('a'), Marked('b')],
        Letters(),
        batch_size=8,
        row_length=30,
        canvases_per_row=0,
        canvas_length=0,
        seed=0,
        weights=(3, 1),
    )
    tokens = np.concatenate([next(batches)['tokens'] for _ in range(10)])
    ratio = np.sum(tokens == ord('a')) / np.sum(tokens == ord('b'))
    assert 2.7 < ratio < 3.3


class Numbered(Marked):
    """A source of examples that contain their index."""

    def __getitem__(self, index):
        return {'prompt': chr(100 + index), 'response': 'x'}


class OnDevices(Marked):
    """A source whose examples tell whether JAX has started a backend in their process."""

    def __getitem__(self, index):
        return {'prompt': str(int(xla_bridge.backends_are_initialized())), 'response': 'y'}


def one_by_one(sources, **settings):
    """Returns a stream with one document per batch."""
    return make_train_iterator(
        sources,
        Letters(),
        batch_size=1,
        row_length=3,
        canvases_per_row=0,
        canvas_length=0,
        seed=0,
        packing_bins=1,
        **settings,
    )


def test_processes_read_disjoint_shards_of_an_epoch():
    def seen(process_index):
        batches = one_by_one(Numbered('', 40), process_index=process_index, process_count=2)
        return [int(next(batches)['tokens'][0, 0]) for _ in range(20)]

    first, second = seen(0), seen(1)
    assert sorted(first + second) == list(range(100, 140))


def test_two_workers_read_every_document_of_an_epoch_once_and_touch_no_device():
    batches = one_by_one([Numbered('', 40), OnDevices('', 40)], workers=2)
    with closing(batches):
        rows = [next(batches)['tokens'][0] for _ in range(80)]
    for worker in (rows[::2], rows[1::2]):  # each has its part of both sources
        assert sum(row[1] == ord('x') for row in worker) == 20
    assert sorted(row[0] for row in rows if row[1] == ord('x')) == list(range(100, 140))
    assert {chr(row[0]) for row in rows if row[1] != ord('x')} == {'0'}


def test_data_that_fits_no_row_is_an_error_and_not_an_endless_search():
    with pytest.raises(ValueError, match='fit no row'):
        next(stream(row_length=8, sources=DataSpec(kind='wordmath', size=10), prefetch=0))


def test_canvases_of_some_documents_start_inside_the_response():
    at_the_start = []
    stream = make_train_iterator(
        DataSpec(kind='wordmath', size=300),
        Tokenizer.load('builtin'),
        batch_size=4,
        row_length=256,
        canvases_per_row=12,
        canvas_length=16,
        seed=0,
        random_offset_rate=0.5,
    )
    for _ in range(8):
        batch = next(stream)
        rows, slots = np.nonzero(batch['canvas_segment_ids'])
        for row, slot in zip(rows, slots, strict=True):
            offset = batch['canvas_offsets'][row, slot]
            canvas = batch['canvas_tokens'][row, slot]
            inside = batch['segment_ids'][row] == batch['canvas_segment_ids'][row, slot]
            inside[:offset] = False
            held = batch['tokens'][row][inside][: len(canvas)]
            np.testing.assert_array_equal(canvas[: len(held)], held)  # the tokens before the canvas
            first = slot == 0 or (
                batch['canvas_segment_ids'][row, slot - 1] != batch['canvas_segment_ids'][row, slot]
            )
            if first:
                at_the_start.append(not batch['target_mask'][row, offset - 1])
    assert 0.35 < np.mean(at_the_start) < 0.65  # half of them, and the few random offsets of 0


def test_a_document_may_have_one_canvas_of_its_own_at_random():
    batches = make_train_iterator(
        DataSpec(kind='wordmath', size=300),
        Tokenizer.load('builtin'),
        batch_size=4,
        row_length=256,
        canvases_per_row=8,
        canvas_length=16,
        seed=0,
        one_canvas=True,
    )
    first = []
    for _ in range(4):
        batch = next(batches)
        for row in range(4):
            documents = np.unique(batch['segment_ids'][row])[1:]
            used = batch['canvas_segment_ids'][row]
            np.testing.assert_array_equal(np.sort(used[used > 0]), documents)
            offsets = batch['canvas_offsets'][row][used > 0]
            first += [not batch['target_mask'][row, offset - 1] for offset in offsets]
    assert 0.1 < np.mean(first) < 0.9  # not always the first token of the response
