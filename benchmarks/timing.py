"""How the benchmarks take times, and the passes of the sampler as programs to take them of."""

import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.sampling import Controls, SamplingConfig, autoregressive, diffusion, passes
from diffusiongemma.sampling.sampler import prefilled


def seconds(run: Callable, repetitions: int = 9) -> np.ndarray:
    """Times [repetitions] of `run()`, until its result is ready; one run before compiles."""
    return seconds_in_turns({'': run}, repetitions)['']


def seconds_in_turns(
    programs: Mapping[str, Callable], repetitions: int = 9
) -> dict[str, np.ndarray]:
    """`seconds` of each program; they take turns, so that a slow spell of the machine hits all."""
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
    """Median time of one of the `count` passes of each program (`pass_programs`)."""
    times = seconds_in_turns(programs, repetitions)
    return {name: 1e3 * float(np.median(taken)) / count for name, taken in times.items()}


def spread(ratios: np.ndarray) -> str:
    """Median of ratios and their quartiles: '1.52x (1.49-1.60)'."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f'{middle:.2f}x ({low:.2f}-{high:.2f})'


def pass_programs(
    model, params, config: SamplingConfig, tokens: np.ndarray, lengths: np.ndarray, count: int
) -> dict[str, Callable]:
    """Programs of `count` passes each of the sampler, behind prompts that are cached before.

    A denoise step is the whole of it: pass, epilogue, acceptance, the next soft embeddings.

    Args:
      model: the denoiser.
      params: its parameters.
      config: how to sample.
      tokens: [B, P] prompts.
      lengths: [B] their lengths.
      count: passes of a program.
    """
    rng = jax.random.key(0)
    free = config.__class__(**(vars(config) | {'stop_ids': (), 'max_new_tokens': count + 1}))
    state, hidden = jax.jit(prefilled, static_argnums=(0, 1))(
        model, free, params, jnp.asarray(tokens), jnp.asarray(lengths), rng, Controls()
    )

    def repeated(step):
        return jax.jit(lambda params, carry: jax.lax.fori_loop(0, count, step(params), carry))

    task = diffusion.canvas_task(model, state)
    canvas = diffusion.first_noise(model, free, params, task)
    going_on = functools.partial(jnp.zeros_like, canvas.stopped)

    def denoise(params):
        def step(_, canvas):
            canvas = diffusion.denoise_step(model, free, params, state.cache, task, canvas)
            return canvas.replace(stopped=going_on())

        return step

    def commit(params):
        def step(_, tokens):
            hidden, _ = passes.encode_block(model, params, state.cache, tokens, task.active)
            return tokens + (hidden[..., 0] > 1e9)  # so that no pass can be left out

        return step

    def token(params):
        return lambda _, state: autoregressive.next_token(model, free, params, state)

    first = autoregressive.start(model, free, params, state, hidden)
    return {
        'denoise step': functools.partial(repeated(denoise), params, canvas),
        'commit': functools.partial(repeated(commit), params, canvas.canvas),
        'autoregressive token': functools.partial(repeated(token), params, first),
    }
