"""Tests that vocabularies of GGUF files and tokenizer.json split text like sentencepiece."""

import copy
import json

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer import BUILTIN_FILE, SPECIALS, _train

from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.data.vocabulary import scores_of_merges, sentencepiece_model

# Runs of white space and a tag, as in Gemma; the letters of _train's text are merged.
RUNS = ['\n', '\n\n', '\n\n\n', '\u2581\u2581', '\u2581\u2581\u2581', '\t\t', '<table>']
PIECES = ['<', '|', '>', 'turn', ' ', '  ', '\n', '\n\n\n\n', '\t', 'a', 'user and', 'model', 'the']
PIECES += ['\u00e9', '\u4e2d\u6587', '\U0001f600', '\u2581', '\x00', '<0x41>', '<table>', *SPECIALS]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map(''.join))


def parts(model: bytes):
    """Returns the pieces, scores and types of a sentencepiece model, as stored in GGUF."""
    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [p.piece.replace('\u2581', ' ') if p.type == 4 else p.piece for p in content.pieces]
    return pieces, [p.score for p in content.pieces], [p.type for p in content.pieces]


def tokenizer_json(model: bytes) -> dict:
    """Returns the tokenizer.json of a sentencepiece model in the form of Gemma's."""
    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    id_of = {p.piece: i for i, p in enumerate(content.pieces)}
    found = []
    for p in content.pieces:
        for i in range(1, len(p.piece)) if p.type in (1, 4) else ():
            left, right = p.piece[:i], p.piece[i:]
            if left in id_of and right in id_of:
                found.append(
                    (-p.score if p.type == 1 else -1e9, len(left), len(right), left, right)
                )
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    added = [
        {'id': i, 'content': p.piece, 'special': p.type != 4, **flags}
        for i, p in enumerate(content.pieces)
        if p.type in (2, 3, 4)
    ]
    return {
        'version': '1.0',
        'added_tokens': added,
        'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'},
        'pre_tokenizer': None,
        'post_processor': None,
        'decoder': None,
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'fuse_unk': True,
            'byte_fallback': True, 'vocab': id_of,
            'merges': [list(pair[3:]) for pair in sorted(found)],
        },
    }  # fmt: skip


MODELS = {
    'builtin': BUILTIN_FILE.read_bytes(),
    'runs': _train(
        ['<mask>', '<start_of_turn>', '<end_of_turn>', *RUNS],
        **{f'{name}_piece': f'<{name}>' for name in ('pad', 'eos', 'bos', 'unk')},
    ),
}


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope='module')
def readers(model, tmp_path_factory):
    """Returns the tokenizers of a model file, its GGUF vocabulary, and its tokenizer.json."""
    file = tmp_path_factory.mktemp('json') / 'tokenizer.json'
    file.write_text(json.dumps(tokenizer_json(model)))
    gguf = sentencepiece_model(*parts(model), 'a test')
    return Tokenizer(model), Tokenizer(gguf), Tokenizer.load(str(file))


@hypothesis.settings(deadline=None, max_examples=2000)
@hypothesis.given(TEXTS)
@hypothesis.example('a  b   c    d\n\n\n\n\n\t\t\tthe user\r\n  ')
@hypothesis.example('<start_of_turn>user<|turn>< |turn><pad><0x41>\u2581\u2581')
def test_both_readers_agree_with_sentencepiece(readers, text):
    own, *others = readers
    ids = own.encode(text)
    for other in others:
        assert other.encode(text) == ids
        assert other.decode(ids) == text
        assert [other.token_bytes(i) for i in ids] == [own.token_bytes(i) for i in ids]


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(TEXTS)
def test_the_raw_models_agree_too(model, readers, text):
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    for reader in readers[1:]:
        assert reader._processor.encode(text) == expected


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(TEXTS)
def test_the_library_tokenizers_agrees(library, readers, text):
    for special in (*SPECIALS, '\u2581'):  # `encode` reads these as characters
        text = text.replace(special, '')
    assert library.encode(text, add_special_tokens=False).ids == readers[2].encode(text)


@pytest.fixture(scope='module')
def library():
    tokenizers = pytest.importorskip('tokenizers')
    content = tokenizer_json(MODELS['builtin'])
    return tokenizers.Tokenizer.from_str(json.dumps(content))


test_the_library_tokenizers_agrees = pytest.mark.parametrize('model', ['builtin'], indirect=True)(
    test_the_library_tokenizers_agrees
)


def test_special_tokens_keep_their_roles(readers):
    own, *others = readers
    for other in others:
        for name in ('pad_id', 'eos_id', 'bos_id', 'unk_id', 'mask_id', 'stop_ids', 'special_ids'):
            assert getattr(other, name) == getattr(own, name), name
        assert other.format_prompt('Why?') == own.format_prompt('Why?')


def test_a_checkpoint_with_tokenizer_json_alone_has_its_tokenizer(tmp_path):
    convert('builtin-teacher', tmp_path / 'hf', 'hf')
    model = (tmp_path / 'hf/tokenizer.model').read_bytes()
    (tmp_path / 'hf/tokenizer.model').unlink()
    (tmp_path / 'hf/tokenizer.json').write_text(json.dumps(tokenizer_json(model)))
    _, _, tokenizer = load_model(tmp_path / 'hf')
    expected = Tokenizer(model)
    assert tokenizer.chat_turns
    assert tokenizer.format_prompt('12 apples') == expected.format_prompt('12 apples')
    # Without a chat template the checkpoint is a pretrained model.
    (tmp_path / 'hf/chat_template.jinja').unlink()
    assert not load_model(tmp_path / 'hf')[2].chat_turns
    # Its export is a pretrained model too.
    convert(tmp_path / 'hf', tmp_path / 'bundle', 'bundle')
    convert(tmp_path / 'bundle', tmp_path / 'again', 'hf')
    assert not load_model(tmp_path / 'again')[2].chat_turns


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    convert('builtin-teacher', tmp_path / 'hf', 'hf')
    model = sentencepiece_model_pb2.ModelProto.FromString(MODELS['builtin'])
    model.pieces.add(piece='one more', score=-1e6, type=1)
    (tmp_path / 'hf/tokenizer.model').write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match='has 1025 tokens, the model 1024; copy both from one'):
        load_model(tmp_path / 'hf')


def test_a_pretrained_models_tokenizer_formats_plain_text(tmp_path):
    tokenizer = Tokenizer.load().without_chat_turns()
    assert not tokenizer.chat_turns
    assert tokenizer.format_prompt('a b') == [tokenizer.bos_id, *tokenizer.encode('a b')]
    assert tokenizer.format_response('c') == [*tokenizer.encode('c'), tokenizer.eos_id]
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
    tokenizer.save(tmp_path / 'tokenizer.model')
    assert not Tokenizer.load(str(tmp_path / 'tokenizer.model')).chat_turns
    assert tokenizer.content_hash != Tokenizer.load().content_hash
    for ask in (lambda: tokenizer.format_turn('a'), lambda: tokenizer.format_prompt('a', 'b')):
        with pytest.raises(ValueError, match='of a pretrained model'):
            ask()


def broken(**changes):
    content = copy.deepcopy(tokenizer_json(MODELS['runs']))
    for path, value in changes.items():
        inner, _, name = path.rpartition('__')
        (content[inner] if inner else content)[name] = value
    return content


@pytest.mark.parametrize(
    'content, message',
    [
        ('{"model": ', r'tokenizer\.json is not valid JSON'),
        ({}, r'it has no "model"'),
        (broken(model__type='Unigram'), r"model\.type='Unigram' is not as in the tokenizers of"),
        (broken(model__byte_fallback=False), r'model\.byte_fallback=False'),
        (broken(normalizer=None), r'normalizer is not as in'),
        (broken(pre_tokenizer={'type': 'ByteLevel'}), r'pre_tokenizer is not as in'),
        (broken(model__merges=[['a', 'b', 'c']]), r'a merge that is not a pair'),
        (broken(model__merges=[['zz', 'zz']]), r"'zzzz' is merged, but is not in the vocabulary"),
        (broken(model__vocab={'a': 5000}), r'pieces are not 0, 1, 2'),
        (broken(added_tokens=[]), r'has no pad token|lacks'),
    ],
)
def test_a_tokenizer_json_that_cannot_be_read_is_named(tmp_path, content, message):
    file = tmp_path / 'tokenizer.json'
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(str(file))
    assert '\n' not in str(error.value)


def test_runs_that_are_merged_first_are_user_defined_without_added_tokens(readers, tmp_path):
    content = tokenizer_json(MODELS['runs'])
    content['added_tokens'] = [token for token in content['added_tokens'] if token['special']]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    read = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    own = Tokenizer(MODELS['runs'])
    for text in ('  the user', '\n\n\n\n\n', 'a   b\t\t\tc', '     ', '\n \n  \n\n'):
        assert read.encode(text) == own.encode(text)


def test_merges_in_an_order_that_scores_cannot_express_are_refused():
    pieces = ['a', 'b', 'ab', 'ba', 'aba']
    merges = [('a', 'ba'), ('a', 'b'), ('ab', 'a')]
    with pytest.raises(ValueError, match="become 'aba' are not next to each other"):
        scores_of_merges(pieces, [1] * 5, merges, 'a test')


def test_pieces_with_unlisted_pairs_are_a_warning(caplog):
    pieces, types = ['a', 'b', 'ab', 'ba', 'aba'], [1] * 5
    merges = [('a', 'b'), ('b', 'a'), ('a', 'ba')]
    assert scores_of_merges(pieces, types, merges, 'a test') == [-3, -3, 0, -1, -2]
    assert 'a test: 1 pieces, such as ' in caplog.text
