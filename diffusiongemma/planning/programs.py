"""The programs of a config, ready to be compiled for devices that are not there.

Everything is a ShapeDtypeStruct with a sharding; nothing is allocated.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from diffusiongemma import configuration
from diffusiongemma.checkpoints.bundle import CONFIG_FILE, cast_to
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.checkpoints.load import BUILTIN
from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.lora import lora_student
from diffusiongemma.distillation.run import (
    CONFIG_KEYS,
    BatchConfig,
    canvases_per_row,
    distillation_step,
    objectives,
    optimizer_of,
    student_model,
)
from diffusiongemma.distillation.state import create_state
from diffusiongemma.distillation.step import Constants
from diffusiongemma.distillation.student import frozen_params, trained_params
from diffusiongemma.distillation.targets import TargetsConfig
from diffusiongemma.models.config import LayerStack, ModelConfig
from diffusiongemma.models.denoiser import DRAFT_IDS, DiffusionGemma
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma, init_params
from diffusiongemma.parallel import param_shardings, state_shardings
from diffusiongemma.planning.needed import Needed, Tokens, of_pass, of_update


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """A function with abstract arguments.

    Attributes:
      name: what it is.
      function: of the arguments.
      arguments: pytrees of ShapeDtypeStructs with shardings.
      kinds: bytes of each kind of argument on one device.
      donated: positions of the arguments whose memory the results may take.
      tokens: that it trains on or writes.
      needed: the least that it has to move; None where its loops have no known end.
      layers: trained parameters of the layers, whose float32 copies are counted; else empty.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kinds: Mapping[str, float]
    tokens: int
    donated: tuple[int, ...] = ()
    needed: Needed | None = None
    layers: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """What a run takes from its tokenizer; the ids are those of Gemma's vocabularies."""

    vocab_size: int
    mask_id: int = 4
    stop_ids: tuple[int, ...] = (1, 106)
    pad_id: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> 'TokenIds':
        return cls(config.vocab_size, stop_ids=tuple(i for i in (1, 106) if i < config.vocab_size))


def teacher_config(config: ConfigDict, config_name: str, preset: str | None) -> ModelConfig:
    """The architecture that is planned for; raises ValueError where nothing names it."""
    if preset is None and config.teacher in BUILTIN:
        return ModelConfig.from_dict(read_json(BUILTIN[config.teacher] / CONFIG_FILE)['model'])
    name = preset or config_name
    if name not in PRESETS:
        raise ValueError(f'no preset {name!r}: give one of {sorted(PRESETS)} with --model.')
    return PRESETS[name]


def cut_to(config: ModelConfig, num_layers: int) -> ModelConfig:
    """Returns the model with its first layers alone, so that a plan compiles in a minute.

    Args:
      config: of the whole model.
      num_layers: whole repetitions of the layer pattern, so that sliding and full layers keep
        their proportion; layers that share keys and values remain as far as they are among them.

    Raises:
      ValueError: that is no such number of layers.
    """
    period = len(LayerStack(0, config.layer_types).pattern)
    if num_layers % period or not 0 < num_layers <= config.num_layers:
        raise ValueError(
            f'--layers={num_layers}: the model has {config.num_layers} layers in patterns of '
            f'{period}; give a multiple of {period} up to that.'
        )
    shared = max(0, config.num_kv_shared_layers - config.num_layers + num_layers)
    return config.replace(
        layer_types=config.layer_types[:num_layers],
        num_kv_shared_layers=shared,
        kv_shared_ffn_width=config.kv_shared_ffn_width if shared else None,
    )


def training_step(config: ConfigDict, teacher_config: ModelConfig, mesh: Mesh) -> PlannedProgram:
    """The distillation step of `config`, of the stage that takes more: 1, or 2 with several steps.

    Args:
      config: of the run.
      teacher_config: of its teacher.
      mesh: over the devices.
    """
    configuration.check_keys(config, CONFIG_KEYS)
    dtype = configuration.compute_dtype(config)
    compute = ComputeConfig.of(config)
    teacher = compute.place(Gemma(teacher_config.autoregressive, dtype), mesh)
    token_ids = TokenIds.of(teacher.config)
    model = compute.place(student_model(config, teacher, token_ids), mesh)
    optimizer = optimizer_of(config)
    shape = configuration.build(BatchConfig, config.data, 'data')
    top_k = configuration.build(TargetsConfig, config.targets, 'targets').top_k_logits
    teacher_params = abstract_params(teacher, mesh, dtype)
    lora = lora_student(config, model)
    if lora is None:
        draft_ids = abstract_params(model, mesh, dtype).get(DRAFT_IDS)
        frozen = frozen_params(model.config, teacher_params, draft_ids)
        constants = Constants(teacher=None if frozen else teacher_params, student=frozen)
        shardings = trained_params(model.config, param_shardings(model, mesh))
        trained = trained_params(model.config, abstract_params(model, mesh, dtype))
    else:
        base = abstract_params(model, mesh, dtype)
        encodes_alone = lora.config.passes == 'denoise'
        constants = Constants(None if encodes_alone else teacher_params, base)
        shardings = lora.shardings(teacher_params, mesh)
        trained = jax.eval_shape(lora.init, teacher_params)
    if top_k:
        constants = constants._replace(teacher=None)
    state = jax.eval_shape(lambda params: create_state(params, optimizer), trained)
    state = placed(state, state_shardings(state, shardings, mesh))
    stages = objectives(config, token_ids)
    objective = stages[-1][0] if stages[-1][0].num_steps > 1 else stages[0][0]
    step = distillation_step(config, model, teacher, objective, optimizer, lora)
    canvases = canvases_per_row(config, shape)
    layout = RowLayout(shape.row_length, canvases, config.canvas_length, top_k=top_k)
    batch = _batch(layout, shape.batch_size, compute.batch_sharding(mesh, shape.batch_size))
    whole = abstract_params(model, mesh, dtype)
    rows = batch_axes(batch['tokens'])
    needed = of_update(trained, state, mesh, rows)
    counts = (shape.row_length, canvases * config.canvas_length)
    causal, denoised = (Tokens(shape.batch_size * n, shape.batch_size * n) for n in counts)
    needed += of_pass(model, whole, mesh, rows, denoised, denoises=True)
    if model.config.has_frozen_encoder:
        needed += of_pass(model, whole, mesh, rows, causal, denoises=False)
    elif constants.teacher is not None:
        needed += of_pass(teacher, constants.teacher, mesh, rows, causal, denoises=False)
    layers = {name: leaf for name, leaf in state.params.items() if 'backbone' in name}
    kinds = {
        'parameters': device_bytes(state.params),
        'EMA': device_bytes(state.ema_params),
        'optimizer': device_bytes(state.opt_state),
        'teacher': device_bytes(constants.teacher),
        'frozen student': device_bytes(constants.student),
        'batch': device_bytes(batch),
    }
    return PlannedProgram(
        name=f'{type(objective).__name__.lower()} step',
        function=step,
        arguments=(state, constants, batch),
        kinds={name: size for name, size in kinds.items() if size},
        tokens=shape.batch_size * shape.row_length,
        donated=(0,),
        needed=needed,
        layers=tuple(jax.tree.leaves(layers)),
    )


def abstract_params(model: DiffusionGemma | Gemma, mesh: Mesh, dtype: Any) -> Any:
    """Returns the parameters of a model on a mesh, floating ones in `dtype`."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cast_to(dtype, leaf.dtype)), shapes
    )
    return placed(shapes, param_shardings(model, mesh))


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns the same arrays with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _batch(layout: RowLayout, batch_size: int, sharding: NamedSharding) -> Any:
    """Of the shapes that packing makes."""
    k = layout.top_k
    example = {'prompt': '', 'response': ''}
    tokenizer = Tokenizer.load('builtin')
    count = len(tokenizer.format_response(''))
    if k:
        example['teacher_ids'] = np.zeros((count, k), np.int32)
        example['teacher_log_probs'] = np.zeros((count, k), np.float16)
        example['teacher_log_rest'] = np.zeros(count, np.float16)
    rows = pack_examples([example], tokenizer, layout)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in rows.items()
    }


def batch_axes(array: Any) -> tuple[str, ...]:
    """Returns the mesh axes that the rows of a batch are split over."""
    axes = array.sharding.spec[0] if array.sharding.spec else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def device_bytes(tree: Any) -> float:
    """Returns the bytes of one device's shards."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
