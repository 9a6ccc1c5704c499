"""The programs of a config, ready to be compiled for devices that are not there.

Everything is a ShapeDtypeStruct with a sharding; nothing is allocated.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusiongemma import configuration
from diffusiongemma.checkpoints.bundle import CONFIG_FILE, cast_to
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.checkpoints.load import BUILTIN
from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.setup import Setup, sampling_config, student_model
from diffusiongemma.distillation.student import frozen_params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import DRAFT_IDS, DiffusionGemma
from diffusiongemma.models.execution import partition_spec, spread
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import CACHE_AXES, Gemma, init_params
from diffusiongemma.parallel import param_shardings, state_shardings
from diffusiongemma.parallel.sharding import rules_of
from diffusiongemma.sampling import Controls, SamplingConfig, diffusion, lossless, passes
from diffusiongemma.sampling.sampler import MODES, prefilled


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
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kinds: Mapping[str, float]
    tokens: int
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _TokenIds:
    """What a run takes from its tokenizer; the ids are those of Gemma's vocabularies."""

    vocab_size: int
    mask_id: int = 4
    stop_ids: tuple[int, ...] = (1, 106)
    pad_id: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> '_TokenIds':
        return cls(config.vocab_size, stop_ids=tuple(i for i in (1, 106) if i < config.vocab_size))


def teacher_config(teacher: str, config_name: str, preset: str | None) -> ModelConfig:
    """The architecture that is planned for; raises ValueError where nothing names it.

    Args:
      teacher: of the experiment.
      config_name: of its file; tried as a preset's.
      preset: what is planned for whatever these say.
    """
    if preset is None and teacher in BUILTIN:
        return ModelConfig.from_dict(read_json(BUILTIN[teacher] / CONFIG_FILE)['model'])
    name = preset or config_name
    if name not in PRESETS:
        raise ValueError(f'no preset {name!r}: give one of {sorted(PRESETS)} with --model.')
    return PRESETS[name]


def training_step(
    experiment: Experiment, teacher_config: ModelConfig, mesh: Mesh
) -> PlannedProgram:
    """The distillation step of the stage that takes more: 1, or 2 with several steps.

    Args:
      experiment: what is trained.
      teacher_config: of its teacher.
      mesh: over the devices.
    """
    dtype = configuration.compute_dtype(experiment.dtype)
    gemma = Gemma(teacher_config.autoregressive, dtype)
    setup = Setup.of(experiment, gemma, _TokenIds.of(gemma.config), mesh)
    teacher_params = _params(setup.teacher, mesh, dtype)
    student_params = _params(setup.student, mesh, dtype)
    if setup.lora is None:
        draft_ids = student_params.get(DRAFT_IDS)
        frozen = frozen_params(setup.student.config, teacher_params, draft_ids)
    else:
        frozen = student_params
    constants = setup.constants(teacher_params, frozen)
    state = jax.eval_shape(
        setup.initial_state, student_params if experiment.init else teacher_params
    )
    state = _placed(state, state_shardings(state, setup.trained_shardings(teacher_params), mesh))
    objectives = [objective for objective, _ in setup.objectives]
    objective = objectives[-1] if objectives[-1].num_steps > 1 else objectives[0]
    shape = experiment.data
    layout = RowLayout(
        shape.row_length,
        setup.canvases_per_row,
        experiment.canvas_length,
        top_k=experiment.targets.top_k_logits,
    )
    batch = _batch(layout, shape.batch_size, setup.rows)
    kinds = {
        'parameters': _device_bytes(state.params),
        'EMA': _device_bytes(state.ema_params),
        'optimizer': _device_bytes(state.opt_state),
        'teacher': _device_bytes(constants.teacher),
        'frozen student': _device_bytes(constants.student),
        'batch': _device_bytes(batch),
    }
    return PlannedProgram(
        name=f'{type(objective).__name__.lower()} step',
        function=setup.step(objective),
        arguments=(state, constants, batch),
        kinds={name: size for name, size in kinds.items() if size},
        tokens=shape.batch_size * shape.row_length,
        donated=(0,),
    )


def sampler_programs(
    experiment: Experiment,
    teacher_config: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    prompt_length: int,
) -> list[PlannedProgram]:
    """The whole of diffusion sampling, and its passes: prefill, denoise step, commit.

    Args:
      experiment: the run that made the student; `sampling` says how it is sampled.
      teacher_config: of its teacher.
      mesh: over the devices.
      batch_size: rows.
      prompt_length: tokens of a prompt.
    """
    dtype = configuration.compute_dtype(experiment.dtype)
    teacher = Gemma(teacher_config.autoregressive, dtype)
    token_ids = _TokenIds.of(teacher.config)
    compute = experiment.execution
    model = compute.place(student_model(experiment, teacher, token_ids), mesh)
    sampling = sampling_config(experiment, token_ids)
    params = _params(model, mesh, dtype)
    rows = compute.batch_sharding(mesh, batch_size)
    tokens = jax.ShapeDtypeStruct((batch_size, prompt_length), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)

    def start(params: Any, tokens: Any, lengths: Any, keys: Any) -> Any:
        return prefilled(model, sampling, params, tokens, lengths, keys, Controls())[0]

    state = jax.eval_shape(start, params, tokens, lengths, keys)
    cache = _placed(state.cache, cache_shardings(model, state.cache, mesh))
    state = _placed(state, jax.tree.map(lambda _: rows, state)).replace(cache=cache)
    if model.light is not None:
        return _lossless_programs(model, sampling, params, state, (tokens, lengths, keys))

    def step(params: Any, state: Any) -> Any:
        task = diffusion.canvas_task(model, state)
        noise = diffusion.first_noise(model, sampling, params, task)
        return diffusion.denoise_step(model, sampling, params, state.cache, task, noise)

    def commit(params: Any, cache: Any, canvas: Any) -> Any:
        active = jnp.ones(canvas.shape[:1], bool)
        return passes.extend(model, params, cache, canvas, active)

    canvas = jax.ShapeDtypeStruct((batch_size, experiment.canvas_length), jnp.int32, sharding=rows)
    weights = {'parameters': _device_bytes(params)}
    cached = weights | {'cache': _device_bytes(cache)}
    written = batch_size * experiment.canvas_length
    whole = lambda p, *arguments: MODES['diffusion'].generate(  # noqa: E731
        model, sampling, p, *arguments, Controls()
    )
    prompts = (tokens, lengths, keys)
    return [
        PlannedProgram(
            'generate', whole, (params, *prompts), weights, batch_size * sampling.max_new_tokens
        ),
        PlannedProgram('prefill', start, (params, *prompts), weights, batch_size * prompt_length),
        PlannedProgram('denoise step', step, (params, state), cached, written),
        PlannedProgram('commit', commit, (params, cache, canvas), cached, written, (1,)),
    ]


def _lossless_programs(
    model: DiffusionGemma,
    sampling: SamplingConfig,
    params: Any,
    generation: Any,
    prompts: tuple[Any, Any, Any],
) -> list[PlannedProgram]:
    """The whole of lossless sampling with a light denoiser, and its passes: draft and verify."""
    tokens, lengths, _ = prompts
    batch_size, rows = tokens.shape[0], tokens.sharding
    hidden = jax.ShapeDtypeStruct((batch_size, model.config.width), model.dtype, sharding=rows)

    def first(params: Any, *arguments: Any) -> Any:
        return lossless.start(model, sampling, params, *arguments)

    state = jax.eval_shape(first, params, generation, hidden, tokens, lengths)
    state = _placed(state, jax.tree.map(lambda _: rows, state)).replace(generation=generation)

    def draft(params: Any, state: Any) -> Any:
        noise = lossless.text_noise(model, sampling, state)
        return lossless.draft(model, sampling, params, state, noise)

    def verify(params: Any, state: Any, drafted: Any) -> Any:
        noise = lossless.text_noise(model, sampling, state)
        return lossless.verify_draft(model, sampling, params, state, drafted, noise)

    def whole(params: Any, *prompts: Any) -> Any:
        return MODES['lossless'].generate(model, sampling, params, *prompts, Controls())

    drafted = jax.eval_shape(draft, params, state)
    drafted = _placed(drafted, jax.tree.map(lambda _: rows, drafted))
    weights = {'parameters': _device_bytes(params)}
    cached = weights | {'cache': _device_bytes(generation.cache)}
    count = batch_size * lossless.draft_length(model, sampling)
    new = batch_size * sampling.max_new_tokens
    return [
        PlannedProgram('generate', whole, (params, *prompts), weights, new),
        PlannedProgram('draft', draft, (params, state), cached, count),
        PlannedProgram('verify', verify, (params, state, drafted), cached, count + batch_size),
    ]


def _params(model: DiffusionGemma | Gemma, mesh: Mesh, dtype: Any) -> Any:
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cast_to(dtype, leaf.dtype)), shapes
    )
    return _placed(shapes, param_shardings(model, mesh))


def _placed(shapes: Any, shardings: Any) -> Any:
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


def cache_shardings(model: Gemma, cache: KVCache, mesh: Mesh) -> Any:
    """The sharding of each array of a cache, as the axis table of the model says."""

    def of(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = CACHE_AXES[:1] if leaf.ndim == 1 else (None,) * (leaf.ndim - 4) + CACHE_AXES
        return NamedSharding(mesh, partition_spec(spread(leaf.shape, names, rules_of(model), mesh)))

    return jax.tree.map(of, cache)


def _device_bytes(tree: Any) -> float:
    """Bytes of one device's shards."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
