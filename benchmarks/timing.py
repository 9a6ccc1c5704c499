"""Measures times for the benchmarks, and builds programs of the sampler's passes."""

import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.sampling import Controls, SamplingConfig, autoregressive, diffusion, passes
from diffusiongemma.sampling.sampler import prefilled


def seconds(run: Callable, repetitions: int = 9) -> np.ndarray:
    """Returns seconds [repetitions] of `run()` until its result is ready, after a warm-up run."""
    return seconds_in_turns({'': run}, repetitions)['']


def seconds_in_turns(
    programs: Mapping[str, Callable], repetitions: int = 9
) -> dict[str, np.ndarray]:
    """Returns `seconds` of programs that take turns, so that a slow period affects all of them."""
    for run in programs.values():
        jax.block_until_ready(run())
    times = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(taken) for name, taken in times.items()}


def pass_milliseconds(
    programs: Mapping[str, Callable], count: int, repetitions: int = 9
) -> dict[str, float]:
    """Returns the median time of one of the `count` passes of each program."""
    times = seconds_in_turns(programs, repetitions)
    return {name: 1e3 * float(np.median(taken)) / count for name, taken in times.items()}


def spread(ratios: np.ndarray) -> str:
    """Returns the median of ratios and their quartiles as text: '1.52x (1.49-1.60)'."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f'{middle:.2f}x ({low:.2f}-{high:.2f})'


def pass_programs(
    model, params, config: SamplingConfig, tokens: np.ndarray, lengths: np.ndarray, count: int
) -> dict[str, Callable]:
    """Returns programs of `count` passes each of the sampler, after cached prompts.

    A denoise step includes the pass, the epilogue, acceptance, and the next soft embeddings.

    Args:
      model: the denoiser.
      params: its parameters.
      config: the sampling config.
      tokens: [B, P] the prompts.
      lengths: [B] the lengths of the prompts.
      count: the number of passes per program.
    """
    rng = jax.random.key(0)
    # Without stop tokens, no row ends before `count` passes.
    endless = config.__class__(**(vars(config) | {'stop_ids': (), 'max_new_tokens': count + 1}))
    prompts = jnp.asarray(tokens), jnp.asarray(lengths)
    state, hidden = jax.jit(prefilled, static_argnums=(0, 1))(
        model, endless, params, *prompts, rng, Controls()
    )

    def repeated(step):
        return jax.jit(lambda params, carry: jax.lax.fori_loop(0, count, step(params), carry))

    task = diffusion.canvas_task(model, state)
    canvas = diffusion.first_noise(model, endless, params, task)
    not_stopped = functools.partial(jnp.zeros_like, canvas.stopped)

    def denoise(params):
        def step(_, canvas):
            canvas = diffusion.denoise_step(model, endless, params, state.cache, task, canvas)
            return canvas.replace(stopped=not_stopped())

        return step

    def commit(params):
        def step(_, tokens):
            hidden, _ = passes.encode_block(model, params, state.cache, tokens, task.active)
            return tokens + (hidden[..., 0] > 1e9)  # so that the compiler cannot remove a pass

        return step

    def token(params):
        return lambda _, state: autoregressive.next_token(model, endless, params, state)

    first = autoregressive.start(model, endless, params, state, hidden, *prompts)
    return {
        'denoise step': functools.partial(repeated(denoise), params, canvas),
        'commit': functools.partial(repeated(commit), params, canvas.canvas),
        'autoregressive token': functools.partial(repeated(token), params, first),
    }
