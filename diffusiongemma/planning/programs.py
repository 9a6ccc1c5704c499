"""Builds the training step of a config with abstract arguments, so that it can be compiled.

Every array is a ShapeDtypeStruct with a sharding; nothing is allocated, so the devices of the mesh
do not have to exist on this machine.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusiongemma.checkpoints.bundle import CONFIG_FILE, cast_to
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.checkpoints.load import BUILTIN
from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.setup import Setup
from diffusiongemma.distillation.student import frozen_params
from diffusiongemma.models.config import LayerStack, ModelConfig
from diffusiongemma.models.denoiser import DRAFT_IDS, DiffusionGemma
from diffusiongemma.models.execution import compute_dtype
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma, init_params
from diffusiongemma.parallel import param_shardings, state_shardings
from diffusiongemma.planning.needed import Needed, Tokens, of_pass, of_update


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """A function with abstract arguments, ready to be compiled.

    Attributes:
      name: the name in reports.
      function: the function to compile.
      arguments: its arguments, pytrees of ShapeDtypeStructs with shardings.
      kinds: the bytes of each kind of argument on one device.
      tokens: the number of tokens that the program trains on or generates.
      donated: the positions of the arguments whose memory the results may reuse.
      needed: the minimum traffic; None if the number of loop iterations is not known.
      layers: the trained parameters of the layers, whose float32 copies a plan counts; empty for a
        program that trains nothing.
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
    """What a run reads from its tokenizer, with the token ids of Gemma's vocabularies."""

    vocab_size: int
    mask_id: int = 4
    stop_ids: tuple[int, ...] = (1, 106)
    pad_id: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> 'TokenIds':
        """Returns the ids for a vocabulary, which may be too small for all stop ids."""
        return cls(config.vocab_size, stop_ids=tuple(i for i in (1, 106) if i < config.vocab_size))


def teacher_config(teacher: str, config_name: str, preset: str | None) -> ModelConfig:
    """Returns the architecture of the teacher to plan for.

    Args:
      teacher: the teacher that the experiment names.
      config_name: the name of the config file, which may be the name of a preset.
      preset: the preset to plan for instead of both, or None.

    Raises:
      ValueError: if none of these names an architecture.
    """
    if preset is None and teacher in BUILTIN:
        return ModelConfig.from_dict(read_json(BUILTIN[teacher] / CONFIG_FILE)['model'])
    name = preset or config_name
    if name not in PRESETS:
        raise ValueError(f'no preset {name!r}: give one of {sorted(PRESETS)} with --model.')
    return PRESETS[name]


def cut_to(config: ModelConfig, num_layers: int) -> ModelConfig:
    """Returns the architecture with only its first layers, so that a plan compiles in a minute.

    Args:
      config: the architecture of the whole model.
      num_layers: the number of layers to keep, a multiple of the length of the layer pattern, so
        that the proportion of sliding and full layers stays the same. Layers that share keys and
        values stay if they are among the first layers.

    Raises:
      ValueError: if the pattern or the model does not allow that number of layers.
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


def training_step(
    experiment: Experiment, teacher_config: ModelConfig, mesh: Mesh
) -> PlannedProgram:
    """Returns the more expensive distillation step: stage 2 if it has several steps, else stage 1.

    Args:
      experiment: the experiment whose step is planned.
      teacher_config: the architecture of the teacher.
      mesh: the mesh of the devices.
    """
    dtype = compute_dtype(experiment.dtype)
    gemma = Gemma(teacher_config.autoregressive, dtype)
    setup = Setup.of(experiment, gemma, TokenIds.of(gemma.config), mesh)
    teacher_params = abstract_params(setup.teacher, mesh, dtype)
    student_params = abstract_params(setup.student, mesh, dtype)
    if setup.lora is None:
        draft_ids = student_params.get(DRAFT_IDS)
        frozen = frozen_params(setup.student.config, teacher_params, draft_ids)
    else:
        frozen = student_params
    constants = setup.constants(teacher_params, frozen)
    state = jax.eval_shape(
        setup.initial_state, student_params if experiment.init else teacher_params
    )
    state = placed(state, state_shardings(state, setup.trained_shardings(teacher_params), mesh))
    objectives = [objective for objective, _ in setup.objectives]
    objective = objectives[-1] if objectives[-1].num_steps > 1 else objectives[0]
    data = experiment.data
    layout = RowLayout(
        data.row_length,
        setup.canvases_per_row,
        experiment.canvas_length,
        top_k=experiment.targets.top_k_logits,
    )
    batch = _batch(layout, data.batch_size, setup.rows)
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
        function=setup.step(objective),
        arguments=(state, constants, batch),
        kinds={name: size for name, size in kinds.items() if size},
        tokens=data.batch_size * data.row_length,
        donated=(0,),
        needed=_needed_of_step(setup, constants.teacher, state, batch),
        layers=tuple(jax.tree.leaves(layers)),
    )


def _needed_of_step(setup: Setup, teacher_params: Any, state: Any, batch: Any) -> Needed:
    """Returns the minimum traffic of a distillation step."""
    mesh, rows, experiment = setup.mesh, batch_axes(batch['tokens']), setup.experiment
    student = abstract_params(setup.student, mesh, compute_dtype(experiment.dtype))
    data = experiment.data
    counts = (data.row_length, setup.canvases_per_row * experiment.canvas_length)
    causal, denoised = (Tokens(data.batch_size * n, data.batch_size * n) for n in counts)
    needed = of_update(state.params, state, mesh, rows)
    needed += of_pass(setup.student, student, mesh, rows, denoised, denoises=True)
    if setup.student.config.has_frozen_encoder:
        needed += of_pass(setup.student, student, mesh, rows, causal, denoises=False)
    elif teacher_params is not None:
        needed += of_pass(setup.teacher, teacher_params, mesh, rows, causal, denoises=False)
    return needed


def abstract_params(model: DiffusionGemma | Gemma, mesh: Mesh, dtype: Any) -> Any:
    """Returns the abstract parameters of a model on a mesh, with floating-point ones in `dtype`."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cast_to(dtype, leaf.dtype)), shapes
    )
    return placed(shapes, param_shardings(model, mesh))


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns abstract arrays with the same shapes and dtypes, and with the shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _batch(layout: RowLayout, batch_size: int, sharding: NamedSharding) -> Any:
    """Returns an abstract batch with the shapes and dtypes that packing produces."""
    k = layout.top_k
    example: dict[str, Any] = {'prompt': '', 'response': ''}
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
    """Returns the mesh axes that split the rows of a batch."""
    axes = array.sharding.spec[0] if array.sharding.spec else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def device_bytes(tree: Any) -> float:
    """Returns the bytes of the shards that one device holds."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
