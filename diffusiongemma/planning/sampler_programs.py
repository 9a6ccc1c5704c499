"""Builds the programs of a sampler with abstract arguments, so that they can be compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.setup import sampling_config, student_model
from diffusiongemma.models.cache import KVCache
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.execution import compute_dtype, partition_spec, spread
from diffusiongemma.models.inference import is_unrolled, with_execution
from diffusiongemma.models.transformer import CACHE_AXES, Gemma
from diffusiongemma.parallel.sharding import rules_of
from diffusiongemma.planning.needed import Tokens, of_pass
from diffusiongemma.planning.programs import (
    PlannedProgram,
    TokenIds,
    abstract_params,
    batch_axes,
    device_bytes,
    placed,
)
from diffusiongemma.sampling import Controls, SamplingConfig, diffusion, drafter, lossless, passes
from diffusiongemma.sampling.sampler import MODES, prefilled


def sampler_programs(
    experiment: Experiment,
    teacher_config: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    prompt_length: int,
) -> list[PlannedProgram]:
    """Returns the program that generates, and the programs of its single passes.

    The passes are prefill, denoise step and commit, or draft and verify for a light denoiser.

    Args:
      experiment: the run that trains the student; its field `sampling` has the sampling options.
      teacher_config: the architecture of the teacher.
      mesh: the mesh of the devices.
      batch_size: the number of rows.
      prompt_length: the number of tokens of each prompt.
    """
    dtype = compute_dtype(experiment.dtype)
    teacher = Gemma(teacher_config.autoregressive, dtype)
    token_ids = TokenIds.of(teacher.config)
    compute = experiment.execution
    model = compute.place(student_model(experiment, teacher, token_ids), mesh)
    if is_unrolled(model):  # as `for_inference` does
        model = with_execution(model, scan_layers=False)
    sampling = sampling_config(experiment, token_ids)
    params = abstract_params(model, mesh, dtype)
    rows = compute.batch_sharding(mesh, batch_size)
    tokens = jax.ShapeDtypeStruct((batch_size, prompt_length), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)

    def start(params: Any, tokens: Any, lengths: Any, keys: Any) -> Any:
        return prefilled(model, sampling, params, tokens, lengths, keys, Controls())[0]

    state = jax.eval_shape(start, params, tokens, lengths, keys)
    cache = placed(state.cache, cache_shardings(model, state.cache, mesh))
    state = dataclasses.replace(placed(state, jax.tree.map(lambda _: rows, state)), cache=cache)
    if model.light is not None:
        return _lossless_programs(model, sampling, params, state, (tokens, lengths, keys), mesh)
    return _diffusion_programs(model, sampling, params, state, (tokens, lengths, keys), start, mesh)


def _diffusion_programs(
    model: DiffusionGemma,
    sampling: SamplingConfig,
    params: Any,
    state: Any,
    prompts: tuple[Any, Any, Any],
    start: Callable[..., Any],
    mesh: Mesh,
) -> list[PlannedProgram]:
    """Returns the programs of the diffusion mode; `start` prefills the prompts."""
    tokens, cache, rows = prompts[0], state.cache, prompts[0].sharding
    (batch_size, prompt_length), canvas_length = tokens.shape, model.config.canvas_length

    def step(params: Any, state: Any) -> Any:
        task = diffusion.canvas_task(model, state)
        noise = diffusion.first_noise(model, sampling, params, task)
        return diffusion.denoise_step(model, sampling, params, state.cache, task, noise)

    def commit(params: Any, cache: Any, canvas: Any) -> Any:
        active = jnp.ones(canvas.shape[:1], bool)
        return passes.extend(model, params, cache, canvas, active)

    def whole(params: Any, *prompts: Any) -> Any:
        return MODES['diffusion'].generate(model, sampling, params, *prompts, Controls())

    canvas = jax.ShapeDtypeStruct((batch_size, canvas_length), jnp.int32, sharding=rows)
    weights = {'parameters': device_bytes(params)}
    cached = weights | {'cache': device_bytes(cache)}
    written = batch_size * canvas_length

    def needed(passed: int, scored: int, *, denoises: bool) -> Any:
        counts = Tokens(passed, scored, cached['cache'])
        return of_pass(model, params, mesh, batch_axes(tokens), counts, denoises=denoises)

    read = batch_size * prompt_length
    return [
        PlannedProgram(
            'generate', whole, (params, *prompts), weights, batch_size * sampling.max_new_tokens
        ),
        PlannedProgram(
            'prefill', start, (params, *prompts), weights, read,
            needed=needed(read, 0, denoises=False),
        ),
        PlannedProgram(
            'denoise step', step, (params, state), cached, written,
            needed=needed(written, written, denoises=True),
        ),
        PlannedProgram(
            'commit', commit, (params, cache, canvas), cached, written, (1,),
            needed(written, 0, denoises=False),
        ),
    ]  # fmt: skip


def _lossless_programs(
    model: DiffusionGemma,
    sampling: SamplingConfig,
    params: Any,
    generation: Any,
    prompts: tuple[Any, Any, Any],
    mesh: Mesh,
) -> list[PlannedProgram]:
    """Returns the programs of the lossless mode with a light denoiser: generate, draft, verify."""
    tokens, lengths, _ = prompts
    batch_size, rows = tokens.shape[0], tokens.sharding
    hidden = jax.ShapeDtypeStruct((batch_size, model.config.width), model.dtype, sharding=rows)

    def first(params: Any, *arguments: Any) -> Any:
        return lossless.start(model, sampling, params, *arguments)

    state = jax.eval_shape(first, params, generation, hidden, tokens, lengths)
    state = placed(state, jax.tree.map(lambda _: rows, state))
    state = dataclasses.replace(state, generation=generation)

    def draft(params: Any, state: Any) -> Any:
        noise = lossless.text_noise(model, sampling, state)
        return drafter.draft(model, sampling, params, state, noise)

    def verify(params: Any, state: Any, drafted: Any) -> Any:
        noise = lossless.text_noise(model, sampling, state)
        return lossless.verify_draft(model, sampling, params, state, drafted, noise)

    def whole(params: Any, *prompts: Any) -> Any:
        return MODES['lossless'].generate(model, sampling, params, *prompts, Controls())

    drafted = jax.eval_shape(draft, params, state)
    drafted = placed(drafted, jax.tree.map(lambda _: rows, drafted))
    weights = {'parameters': device_bytes(params)}
    cached = weights | {'cache': device_bytes(generation.cache)}
    count = batch_size * drafter.draft_length(model, sampling)
    new, checked = batch_size * sampling.max_new_tokens, count + batch_size

    def needed(passed: int, *, denoises: bool) -> Any:
        counts = Tokens(passed, passed, cached['cache'])
        return of_pass(model, params, mesh, batch_axes(tokens), counts, denoises=denoises)

    return [
        PlannedProgram('generate', whole, (params, *prompts), weights, new),
        PlannedProgram(
            'draft', draft, (params, state), cached, count, needed=needed(count, denoises=True)
        ),
        PlannedProgram(
            'verify', verify, (params, state, drafted), cached, checked,
            needed=needed(checked, denoises=False),
        ),
    ]  # fmt: skip


def cache_shardings(model: Gemma, cache: KVCache, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a cache by the axis table of the model."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = CACHE_AXES[:1] if leaf.ndim == 1 else (None,) * (leaf.ndim - 4) + CACHE_AXES
        return NamedSharding(mesh, partition_spec(spread(leaf.shape, names, rules_of(model), mesh)))

    return jax.tree.map(sharding, cache)
