"""Generation by discrete diffusion: one canvas after another, each denoised as a whole.

prefill -> while rows are unfinished { noise -> while rows are uncertain { denoise -> accept ->
renoise -> stop? } -> emit -> commit }. Both loops are `lax.while_loop`s (the outer one is in the
sampler), so everything compiles to one program that never waits for the host.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diffusiongemma.constraints.posterior import condition
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import acceptance, passes
from diffusiongemma.sampling.acceptance import Proposal
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import OPEN, restrict, traced, without_unknown
from diffusiongemma.sampling.epilogue import (
    Prediction,
    adjust,
    always_greedy,
    argmax_and_draw,
    keep_top,
    per_row,
    pick,
    read_logits,
)
from diffusiongemma.sampling.finite import are_finite
from diffusiongemma.sampling.interface import CausalModel, DenoisingModel, traits
from diffusiongemma.sampling.noise import first_canvas, hold, noise_vocab
from diffusiongemma.sampling.randomness import fold_in_rows, split_rows
from diffusiongemma.sampling.state import CanvasTask, DenoiseState, GenerationState


def start(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: GenerationState,
    hidden: jax.Array,
    prompt: jax.Array,
    prompt_lengths: jax.Array,
) -> GenerationState:
    """Returns the state unchanged, because a canvas only needs the cached prompts."""
    del model, config, params, hidden, prompt, prompt_lengths
    return state


def next_canvas(
    model: DenoisingModel, config: SamplingConfig, params: Params, state: GenerationState
) -> GenerationState:
    """Denoises one canvas of every unfinished row, emits it and commits it to the cache."""
    task = canvas_task(model, state)
    canvas = denoise_canvas(model, config, params, state.cache, task)
    return commit_canvas(model, config, params, state, canvas)


def canvas_task(
    model: CausalModel, state: GenerationState, length: int | None = None, first: int = 0
) -> CanvasTask:
    """Returns the task of the next canvas of every row.

    Args:
      model: the diffusion model.
      state: the responses before the canvas.
      length: the number of canvas tokens; None for the canvas length of the model.
      first: the number of tokens between the cached ones and the canvas, see `CanvasTask`.
    """
    length, controls = length or traits(model).canvas_length, state.controls
    return CanvasTask(
        length=length,
        first=first,
        keys=fold_in_rows(state.keys, state.canvases),
        active=~state.finished,
        last_token=state.last_token,
        pinned=controls.pinned_at(state.lengths, length),
        seed=controls.seed_at(state.lengths, length),
        allowed=controls.allowed_at(state.lengths, length),
        temperature=traced(controls.temperature),
        top_p=traced(controls.top_p),
        automaton=controls.automaton,
        automaton_states=state.automaton_states,
        remaining=state.limits - state.lengths,
    )


def commit_canvas(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: GenerationState,
    canvas: DenoiseState,
) -> GenerationState:
    """Emits a canvas, and encodes and appends it to the cache for the rows that continue."""
    active, tokens = ~state.finished, canvas.result(config)
    state = state.finish_unless(canvas.finite, 'denoise')
    state = state.emit(config, tokens, canvas.steps)
    state = dataclasses.replace(
        state,
        canvases=state.canvases + active,
        causal_passes=state.causal_passes + ~state.finished,
    )

    def commit(cache: KVCache) -> tuple[KVCache, jax.Array]:
        hidden, cache = passes.extend(model, params, cache, tokens, ~state.finished)
        return cache, are_finite(hidden)

    # The last canvas of a response is not committed.
    cache, finite = jax.lax.cond(
        state.running, commit, lambda cache: (cache, jnp.ones_like(active)), state.cache
    )
    return dataclasses.replace(state, cache=cache).finish_unless(finite, 'commit')


def denoise_canvas(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Params,
    cache: KVCache,
    task: CanvasTask,
    max_steps: int | None = None,
) -> DenoiseState:
    """Denoises a canvas from noise until every row has stopped.

    Args:
      model: the diffusion model.
      config: the sampling settings.
      params: the parameters of the model.
      cache: the K/V cache of the tokens before the canvas.
      task: the canvas to denoise.
      max_steps: an additional limit on the number of steps.

    Returns:
      The state after the last step; `result` is the canvas to commit.
    """
    limit = min(max_steps or config.max_denoising_steps, config.max_denoising_steps)
    noise = first_noise(model, config, params, task)
    step = functools.partial(denoise_step, model, config, params, cache, task)
    if limit == 1:  # without a loop, XLA removes computations that only a next step would need
        return step(noise)
    return jax.lax.while_loop(
        lambda state: (state.step < limit) & ~jnp.all(state.stopped), step, noise
    )


def first_noise(
    model: DenoisingModel, config: SamplingConfig, params: Params, task: CanvasTask
) -> DenoiseState:
    """Returns the state before the first denoise step: noise, except for seeds and pins."""
    batch_size, length = task.keys.shape[0], task.length or traits(model).canvas_length
    window = config.stopping_rule.history_length
    noise = first_canvas(model, config, split_rows(task.keys)[0], length)
    canvas = hold(task.pinned, hold(task.seed, noise))
    return DenoiseState(
        step=jnp.zeros((), jnp.int32),
        canvas=canvas,
        argmax_history=jnp.full((batch_size, window, length), -1, jnp.int32),
        entropies=jnp.full((batch_size, length), jnp.inf, jnp.float32),
        soft_embeddings=passes.no_soft_embeddings(model, params, batch_size, length),
        stopped=~task.active,
        steps=jnp.zeros((batch_size,), jnp.int32),
        finite=jnp.ones((batch_size,), bool),
        rule_state=acceptance.first_state(config.acceptance_rule, canvas),
    )


def denoise_step(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Params,
    cache: KVCache,
    task: CanvasTask,
    state: DenoiseState,
) -> DenoiseState:
    """Runs one denoise step: denoise, accept, renoise and stop. Stopped rows keep their state.

    Args:
      model: the diffusion model.
      config: the sampling settings.
      params: the parameters of the model.
      cache: the K/V cache of the tokens before the canvas.
      task: the canvas to denoise.
      state: the state after `state.step` steps.
    """
    keys = fold_in_rows(split_rows(task.keys)[1], state.step)
    logits = passes.denoise(
        model,
        params,
        cache,
        state.canvas,
        state.soft_embeddings,
        task.last_token,
        task.first,
        task.teacher_state,
    )  # [B, C, V]
    mask_id = traits(model).mask_id
    settled = _settled(mask_id, task, state.canvas)  # [B, C], or None
    shaped = _shape(config, mask_id, task, state.step, logits)
    proposal, prediction, shaped = _propose(model, config, task, state, keys, shaped, settled)
    argmax = prediction.argmax
    if task.text_noise is not None and task.automaton is None:
        argmax = _drawn(config, task, restrict(logits, settled, task.allowed))
    rule = config.acceptance_rule
    canvas, rule_state = acceptance.next_canvas(rule, proposal, state.rule_state)
    history = jnp.concatenate([state.argmax_history[:, 1:], argmax[:, None]], axis=1)  # [B, W, C]
    stop = config.stopping_rule.should_stop(history, proposal.entropies)
    # Logits with NaN or infinity have an entropy that is not finite.
    finite = state.finite & (state.stopped | are_finite(proposal.entropies))
    stop |= ~finite
    if mask_id is not None:
        stop |= jnp.all(canvas != mask_id, axis=-1)  # [B], no mask is left
    if task.max_steps is not None:
        stop |= state.step + 1 >= task.max_steps
    last = jnp.all(state.stopped | stop) | (state.step + 1 >= config.max_denoising_steps)  # []
    soft_embeddings = state.soft_embeddings
    if traits(model).self_conditioning:  # no step reads those of the last one
        embed = functools.partial(passes.soft_embed, model, params, shaped, prediction.log_z)
        soft_embeddings = jax.lax.cond(last, lambda: state.soft_embeddings, embed)

    def unless_stopped(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(per_row(state.stopped, old), old, new)

    return DenoiseState(
        step=state.step + 1,
        canvas=unless_stopped(canvas, state.canvas),
        argmax_history=unless_stopped(history, state.argmax_history),
        entropies=unless_stopped(proposal.entropies, state.entropies),
        soft_embeddings=unless_stopped(soft_embeddings, state.soft_embeddings),
        stopped=state.stopped | stop,
        steps=state.steps + ~state.stopped,
        finite=finite,
        rule_state=jax.tree.map(unless_stopped, rule_state, state.rule_state),
    )


def _drawn(config: SamplingConfig, task: CanvasTask, logits: jax.Array) -> jax.Array:
    """Returns tokens [B, C] of a draft that use the same noise as the text.

    Drafts that are drawn like the text are accepted more often than its most likely tokens.
    """
    temperature = _temperature(config, task)
    adjusted = adjust(logits, temperature, config.top_k, _top_p(config, task))
    return pick(adjusted, temperature, task.text_noise)


def _settled(mask_id: int | None, task: CanvasTask, canvas: jax.Array) -> jax.Array | None:
    """Returns the tokens [B, C] int32 that this step may not change, -1 elsewhere, or None."""
    if mask_id is None:
        return task.pinned
    return hold(task.pinned, jnp.where(canvas == mask_id, OPEN, canvas))


def _shape(
    config: SamplingConfig,
    mask_id: int | None,
    task: CanvasTask,
    step: jax.Array,
    logits: jax.Array,
) -> jax.Array:
    """Returns shaped logits [B, C, V]: divided by the temperature, -inf for impossible tokens."""
    shaped = logits / per_row(_divisor(config, task, step), logits)
    if mask_id is not None:
        shaped = shaped.at[..., mask_id].set(-jnp.inf)
    return without_unknown(shaped, config.vocab_size)


def _divisor(config: SamplingConfig, task: CanvasTask, step: jax.Array) -> jax.Array:
    """Returns the divisor of the logits of a step, [] or [B] float32."""
    factor = jnp.asarray(_temperature(config, task), jnp.float32)
    temperature = config.schedule.temperature(config.schedule.noise_level(step))
    return temperature * jnp.where(factor == 0, 1.0, factor)  # 0 means greedy, not a divisor


def _propose(
    model: CausalModel,
    config: SamplingConfig,
    task: CanvasTask,
    state: DenoiseState,
    keys: jax.Array,
    logits: jax.Array,
    settled: jax.Array | None,
) -> tuple[Proposal, Prediction, jax.Array]:
    """Returns the proposal, the prediction, and the logits [B, C, V] that it was computed from.

    These are the shaped logits without banned tokens or, with an automaton, the log-marginals.

    Args:
      model: the diffusion model.
      config: the sampling settings.
      task: the canvas to denoise.
      state: the state before the step.
      keys: [B] keys.
      logits: [B, C, V], the result of `_shape`.
      settled: [B, C] int32, the result of `_settled`.
    """
    (candidate_keys, noise_keys), temperature = split_rows(keys), _temperature(config, task)
    shaped = restrict(logits, settled, task.allowed)
    if task.automaton is None:
        adjusted = keep_top(shaped, config.top_k, _top_p(config, task))
        drawn = argmax_and_draw(shaped, adjusted, temperature, candidate_keys)
        largest, argmax, candidates = drawn  # [B, C] each
        logits = restrict(logits, task.pinned, task.allowed)
    else:
        largest, states, remaining = None, task.automaton_states, task.remaining
        assert states is not None and remaining is not None  # set together with the automaton
        posterior = condition(task.automaton, shaped, states, remaining)
        argmax = candidates = posterior.most_likely()
        if not always_greedy(temperature):
            greedy = per_row(jnp.asarray(temperature) == 0, argmax)  # [] or [B, 1]
            candidates = jnp.where(greedy, argmax, posterior.draw(candidate_keys))
        logits = shaped = posterior.log_marginals()
    prediction = read_logits(shaped, candidates, argmax, largest)
    length = state.canvas.shape[-1]
    everywhere = jnp.ones(argmax.shape, bool)
    proposal = Proposal(
        canvas=state.canvas,
        candidates=candidates,
        noise=first_canvas(model, config, noise_keys, length),
        open=everywhere if settled is None else settled == OPEN,
        entropies=prediction.entropies,
        confidences=prediction.confidences,
        margins=prediction.margins,
        noise_level=config.schedule.noise_level(state.step),
        next_noise_level=config.schedule.noise_level(state.step + 1),
        keys=fold_in_rows(noise_keys, 1),  # noise_keys itself has drawn the noise
        vocab_size=noise_vocab(model, config),
        pinned=None if task.pinned is None else task.pinned != OPEN,
        logits=logits,
        temperature=per_row(_divisor(config, task, state.step), argmax),
        greedy=per_row(jnp.asarray(temperature) == 0, argmax),
    )
    return proposal, prediction, shaped


def _temperature(config: SamplingConfig, task: CanvasTask) -> float | jax.Array:
    return config.temperature if task.temperature is None else task.temperature


def _top_p(config: SamplingConfig, task: CanvasTask) -> float | jax.Array | None:
    return config.top_p if task.top_p is None else task.top_p
