"""Tests that small programs compiled for TPUs execute and move little more than is needed."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from test_plan import placed

from diffusiongemma.accounting.hlo import Program
from diffusiongemma.distillation.experiment import Experiment, experiment_config
from diffusiongemma.distillation.head import score_positions
from diffusiongemma.models import AttentionConfig, Gemma, ModelConfig, MoEConfig, init_params
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.expert_parallel import TOKEN_AXES
from diffusiongemma.models.layers import GatedMLP
from diffusiongemma.models.weights import WEIGHTS
from diffusiongemma.parallel import make_mesh
from diffusiongemma.parallel.sharding import LOGICAL_AXIS_RULES, replicated
from diffusiongemma.planning.compiler import _at_level, compile_program, topology_devices
from diffusiongemma.planning.programs import training_step
from diffusiongemma.planning.sampler_programs import sampler_programs
from diffusiongemma.sampling.epilogue import argmax_and_draw, read_logits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'"
)
# One layer with enough experts that weights, and not activations, are most of the traffic.
MODEL = ModelConfig(
    vocab_size=512,
    width=256,
    num_heads=4,
    ffn_width=512,
    layer_types=('full',),
    sliding=AttentionConfig(num_kv_heads=4, head_dim=128, window=64),
    full=AttentionConfig(num_kv_heads=4, head_dim=128),
    moe=MoEConfig(num_experts=16, top_k=4, expert_width=512),
)


def experiment(axes, remat):
    """Returns a small experiment with the sizes of the mesh axes and a rematerialization policy."""
    return Experiment.of(
        experiment_config(
            {
                'dtype': 'bfloat16',
                'mesh': axes,
                'compute': {'remat': remat},
                'canvas_length': 64,
                'predict_next': False,
                'targets': {'source': {'kind': 'wordmath', 'size': 8}, 'max_new_tokens': 64},
                'data': {'batch_size': 4, 'row_length': 128, 'canvases_per_row': 1},
                'stage1': {'self_conditioning_rate': 0.0},
                'stage2': {'num_steps': 1},
                'train': {'num_steps': 2},
                'sampling': {'max_new_tokens': 64},
            }
        )
    )


def compiled(program, mesh, figures, level):
    """Compiles a program and returns its plan and the ratios to what is needed."""
    plan = compile_program(program, mesh, figures, level)
    return plan, plan.ratios(mesh.size)


def test_a_denoise_step_multiplies_each_row_once_and_reads_each_weight_once():
    planned = experiment({'tensor': 4}, 'none')
    devices, figures = topology_devices('v5e:2x2')
    mesh = planned.mesh.make(devices)
    programs = sampler_programs(planned, MODEL, mesh, batch_size=4, prompt_length=64)
    (step,) = (program for program in programs if program.name == 'denoise step')
    _, ratios = compiled(step, mesh, figures, 'O2')
    assert 0.95 < ratios['executed FLOPs'] < 1.25
    assert 1 < ratios['HBM bytes'] < 1.6


@pytest.mark.slow
def test_a_step_computes_what_the_model_asks_for_and_holds_few_copies_of_its_gradients():
    planned = experiment({'fsdp': 2, 'expert': 2}, 'full')
    devices, figures = topology_devices('v5e:2x2')
    mesh = planned.mesh.make(devices)
    plan, ratios = compiled(training_step(planned, MODEL, mesh), mesh, figures, 'O1')
    assert 0.95 < ratios['executed FLOPs'] - ratios['recomputed FLOPs'] < 1.25
    assert 0 < plan.copies <= 4
    assert ratios['bytes sent'] < 1.5


@pytest.mark.slow
def test_layers_are_recomputed_one_after_another():
    """Three layers are one repetition of the pattern, and its loop has a single iteration."""
    devices, _ = topology_devices('v5e:2x2')
    mesh = make_mesh({'data': 1}, devices[:1])
    execution = Execution(mesh, LOGICAL_AXIS_RULES, remat='full', platform='tpu')
    layer_types = ('sliding', 'sliding', 'full')
    config = MODEL.autoregressive.replace(moe=None, layer_types=layer_types)
    model = Gemma(config, jnp.bfloat16, execution)
    tokens = placed(execution, (1, 4096), jnp.int32, (None, None))
    params = jax.tree.map(
        lambda leaf: placed(execution, leaf.shape, leaf.dtype, [None] * leaf.ndim),
        jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)),
    )

    def loss(params, tokens):
        args = (tokens, tokens, jnp.ones_like(tokens))
        hidden, _ = model.apply({'params': params}, *args, method='encode')
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    lowered = jax.jit(jax.grad(loss)).lower(params, tokens)
    with _at_level('O1'):
        memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 150e6  # 238 MB if all layers are recomputed first


def test_kernels_split_along_64_chips_are_gathered_and_their_gradients_scattered():
    devices, _ = topology_devices('v5e:8x8')
    mesh = make_mesh({'fsdp': 8, 'expert': 8}, devices)
    execution = Execution(mesh, LOGICAL_AXIS_RULES, platform='tpu')
    width = 1024
    mlp = GatedMLP(width, width, jnp.bfloat16, execution)
    x = placed(execution, (mesh.size, 1, 128, width), jnp.bfloat16, TOKEN_AXES)
    kernels = {
        name: placed(execution, (width, width), jnp.float32, WEIGHTS[f'mlp/{name}'].axes)
        for name in ('gate', 'up', 'down')
    }

    def loss(kernels, x):
        kernels = jax.tree.map(lambda kernel: kernel.astype(jnp.bfloat16), kernels)
        x = execution.constrain(mlp.apply({'params': kernels}, x), *TOKEN_AXES)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    shardings = jax.tree.map(lambda kernel: kernel.sharding, kernels)
    text = jax.jit(jax.grad(loss), out_shardings=shardings).lower(kernels, x).compile().as_text()
    collectives = Program(text).collectives(mesh.shape)
    along_all = [c for c in collectives if c.axes == 'fsdp+expert']
    assert sum(c.sent_bytes for c in along_all) < 1e4  # only the loss is summed along both axes
    # Three kernels are gathered in bfloat16, and their gradients are summed and split in float32.
    minimum = 3 * (2 + 4) * width * width * 63 / 64
    assert sum(c.sent_bytes for c in collectives) < 1.1 * minimum


def test_one_pass_over_the_logits_finds_maxima_and_draws_and_one_more_their_entropies():
    devices, _ = topology_devices('v5e:2x2')
    mesh = make_mesh({'tensor': 4}, devices)
    execution = Execution(mesh, LOGICAL_AXIS_RULES, platform='tpu')
    logits = placed(execution, (8, 256, 131_072), jnp.float32, (None, None, 'vocab'))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=replicated(mesh))

    def statistics(logits, keys):
        largest, argmax, drawn = argmax_and_draw(logits, logits, 1.0, keys)
        return argmax, drawn, read_logits(logits, drawn, argmax, largest).entropies

    program = Program(jax.jit(statistics).lower(logits, keys).compile().as_text())
    assert program.hbm_bytes() < 2.3 * logits.size * 4 / mesh.size


def sent_by_the_head(num_chunks):
    """Returns the bytes that a loss and its gradient send, by kind of collective."""
    devices, _ = topology_devices('v5e:2x4')
    mesh = make_mesh({'fsdp': 4, 'expert': 2}, devices)
    length, width, vocab_size = 64, MODEL.width, 4096
    settings = {'platform': 'tpu', 'logits_chunk': length // num_chunks}
    execution = Execution(mesh, LOGICAL_AXIS_RULES, **settings)
    model = Gemma(MODEL.autoregressive.replace(vocab_size=vocab_size), jnp.bfloat16, execution)
    axes = WEIGHTS['embedder/embedding'].axes
    table = placed(execution, (vocab_size, width), jnp.float32, axes)
    hidden = placed(execution, (mesh.size, length, width), jnp.bfloat16, ('batch', None, None))

    def score(params, hidden):
        return jax.nn.logsumexp(model.apply({'params': params}, hidden, method='unembed'), axis=-1)

    def loss(table, hidden):
        params = {'embedder': {'embedding': table}}
        return jnp.sum(score_positions(score, model, [params], hidden.shape[:2], hidden))

    gradients = jax.jit(jax.grad(loss), out_shardings=table.sharding)
    text = gradients.lower(table, hidden).compile().as_text()
    sent = dict.fromkeys(('all-gather', 'reduce-scatter', 'all-reduce'), 0.0)
    for collective in Program(text).collectives(mesh.shape):
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.sent_bytes
    return sent, vocab_size * width * (mesh.size - 1) / mesh.size


def test_the_embedding_is_gathered_once_per_pass_and_not_once_per_chunk():
    few, elements = sent_by_the_head(2)
    many, _ = sent_by_the_head(8)
    assert many == few
    assert 2 * elements <= few['all-gather'] < 2.1 * 2 * elements  # in bfloat16, at most twice
    assert few['reduce-scatter'] + few['all-reduce'] < 1.1 * 4 * elements  # once, in float32
