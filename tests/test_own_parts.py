"""Tests that a rule, a loss, a model family or a checkpoint format can be added in one file."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from diffusiongemma import configuration
from diffusiongemma.checkpoints import families, load
from diffusiongemma.checkpoints.hf_config import model_config_from_hf
from diffusiongemma.checkpoints.hf_config_export import TokenIds, hf_config
from diffusiongemma.distillation.drafting import DraftingConfig
from diffusiongemma.distillation.losses import denoise_loss
from diffusiongemma.distillation.stage1 import Stage1Config
from diffusiongemma.distillation.teacher import FullDistribution
from diffusiongemma.sampling import Remask, SamplingConfig, TopK

MODULE = """
import dataclasses
import jax
import jax.numpy as jnp
from diffusiongemma.distillation.losses import cross_entropy

@dataclasses.dataclass(frozen=True)
class First:
    count: int = 1

    def next_canvas(self, proposal):
        first = jnp.arange(proposal.canvas.shape[1]) < self.count
        return proposal.take(jnp.broadcast_to(first, proposal.canvas.shape))

@dataclasses.dataclass(frozen=True)
class Focal:
    gamma: float = 1.0

    def __call__(self, logits, canvas, teacher, kl_weight):
        hard = cross_entropy(logits, canvas)
        return (1 - jnp.exp(-hard)) ** self.gamma * hard

@dataclasses.dataclass(frozen=True)
class Front:
    places: int = 2

    def weights(self, probabilities, valid):
        return jnp.where(valid & (jnp.arange(valid.shape[-1]) < self.places), 1.0, 0.0)

@dataclasses.dataclass(frozen=True)
class Narrow:
    def next_canvas(self, proposal):
        return proposal.canvas[:, :2]

@dataclasses.dataclass
class Mutable:
    def next_canvas(self, proposal):
        return proposal.canvas

@dataclasses.dataclass(frozen=True)
class Wide:
    def weights(self, probabilities, valid):
        return jnp.where(valid, 1.0, 0.0)[..., None]

class Plain:
    def next_canvas(self, proposal):
        return proposal.canvas

def not_a_class():
    raise AssertionError('called')
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a user module into a folder on Python's import path."""
    (tmp_path / 'parts_of_mine.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield 'parts_of_mine'
    sys.modules.pop('parts_of_mine', None)


def test_a_config_names_a_rule_by_its_module(own):
    config = SamplingConfig(acceptance=f'{own}.First(count=3)')
    assert repr(config.acceptance_rule) == 'First(count=3)'
    inside = SamplingConfig(acceptance=f'Remask({own}.First, count=2)').acceptance_rule
    assert isinstance(inside, Remask) and repr(inside.rule) == 'First(count=1)'
    shipped = SamplingConfig(acceptance='diffusiongemma.sampling.acceptance.TopK(2)')
    assert shipped.acceptance_rule == TopK(2)


def test_config_json_holds_the_text_that_names_it_again(own):
    rule = SamplingConfig(acceptance=f'{own}.First(2)').acceptance_rule
    (text,) = configuration.json_values({'acceptance': rule}).values()
    assert text == f'{own}.First(count=2)'
    assert SamplingConfig(acceptance=text).acceptance_rule == rule
    loss = Stage1Config(token_loss=f'{own}.Focal(2)').position_loss()
    written = configuration.json_values(Stage1Config(token_loss=loss))
    assert Stage1Config(**written).position_loss() == loss


def test_a_config_names_a_loss_by_its_module(own):
    assert Stage1Config().position_loss() is denoise_loss
    loss = Stage1Config(token_loss=f'{own}.Focal(gamma=2)').position_loss()
    logits, clean = jax.random.normal(jax.random.key(0), (2, 3, 5)), jnp.ones((2, 3), jnp.int32)
    teacher, weight = FullDistribution(logits), jnp.zeros((2, 3))
    hard = denoise_loss(logits, clean, teacher, weight)
    expected = (1 - jnp.exp(-hard)) ** 2 * hard
    assert jnp.allclose(loss(logits, clean, teacher, weight), expected)


def test_a_config_names_the_weights_of_a_draft_by_their_module(own):
    weights = DraftingConfig(weights=f'{own}.Front(places=1)').position_weights()
    valid = jnp.array([[True, True], [False, False]])
    assert weights.weights(jnp.ones((2, 2)), valid).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda own: SamplingConfig(acceptance='no_such_module_here.First()'), 'No module named'),
        (lambda own: SamplingConfig(acceptance=f'{own}.Last()'), 'is neither a rule nor a number'),
        (lambda own: SamplingConfig(acceptance=f'{own}.not_a_class()'), 'is neither a rule'),
        (lambda own: SamplingConfig(acceptance=f'{own}.Last()'), 'has no Last'),
        (lambda own: SamplingConfig(acceptance=f'{own}.Plain()'), 'it must be a dataclass'),
        (lambda own: SamplingConfig(acceptance=f"{own}.First('2')"), 'arguments are numbers, tup'),
        (
            lambda own: SamplingConfig(acceptance=f'{own}.Narrow()'),
            r'Narrow\(\).next_canvas returned int32\[2, 2\]; it must return the canvas',
        ),
        (lambda own: SamplingConfig(acceptance=f'{own}.Focal()'), 'has no method next_canvas'),
        (lambda own: SamplingConfig(acceptance=f'{own}.First(n=1)'), 'names no rule'),
        (lambda own: Stage1Config(token_loss=f'{own}.First()'), 'no method __call__'),
        (lambda own: Stage1Config(token_loss='Focal()'), 'names no loss; write one of your own'),
        (lambda own: DraftingConfig(weights=f'{own}.First()'), 'has no method weights'),
        (
            lambda own: SamplingConfig(acceptance=f'{own}.Mutable()'),
            r'Mutable\(\) is not hashable, .*write @dataclasses.dataclass\(frozen=True\)',
        ),
        (
            lambda own: DraftingConfig(weights=f'{own}.Wide()'),
            r'Wide\(\).weights returned \(2, 3, 1\) for probabilities \(2, 3\)',
        ),
        (lambda own: DraftingConfig(weights='late'), "must be 'accepted_length', 'decay' or"),
    ],
)
def test_what_cannot_be_named_is_refused_in_one_line(own, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(own)
    assert len(str(caught.value).splitlines()) == 1


def test_a_family_of_models_is_one_entry(monkeypatch):
    """Gemma 3's norms with Gemma 4's sharing of keys and values, under a name of its own."""
    gemma3 = families.BY_MODEL_TYPE['gemma3_text']
    family = dataclasses.replace(
        gemma3,
        model_types=('mine',),
        architecture='MineForCausalLM',
        fields=gemma3.fields | {'norm_scale_offset': 0.5},
        final_logit_softcap=20.0,
        shared_kv=True,
    )
    monkeypatch.setattr(families, 'FAMILIES', (*families.FAMILIES, family))
    monkeypatch.setitem(families.BY_MODEL_TYPE, 'mine', family)
    content = {
        'model_type': 'mine', 'vocab_size': 300, 'hidden_size': 64, 'intermediate_size': 128,
        'num_hidden_layers': 12, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 16,
        'sliding_window': 8, 'num_kv_shared_layers': 2,
    }  # fmt: skip
    config = model_config_from_hf(content)
    assert config.norm_scale_offset == 0.5 and config.final_logit_softcap == 20.0
    assert config.num_kv_shared_layers == 2 and not config.value_norm
    written = hf_config(config, 'float32', TokenIds())
    assert written['architectures'] == ['MineForCausalLM']
    assert model_config_from_hf(written) == config


def test_a_checkpoint_format_is_one_entry(monkeypatch, tmp_path):
    (tmp_path / 'weights.mine').touch()
    model = object()

    def is_mine(directory):
        return (directory / 'weights.mine').exists()

    def open_mine(directory, dtype, mesh):
        return model, {'directory': directory, 'dtype': dtype, 'mesh': mesh}, None

    monkeypatch.setattr(load, 'FORMATS', ((is_mine, open_mine), *load.FORMATS))
    opened, params, tokenizer = load.load_model(tmp_path)
    assert opened is model and tokenizer is None
    assert params == {'directory': tmp_path, 'dtype': jnp.float32, 'mesh': None}
