"""Measures the passes of the sampler and compares the decode modes.

    python benchmarks/sampler.py --checkpoint=builtin --batch_sizes=1,8

All measurements have the same weights and prompts in one process. The first table has a row for
each batch size: median milliseconds of a denoise step, of a commit (the causal pass over a canvas)
and of an autoregressive token, with many repetitions in one program. The second has a row for each
mode: tokens/s (median over batches, with prefill and without compilation), and the ratio to
autoregressive decoding with its quartiles over batches.
"""

import time

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from timing import pass_milliseconds, pass_programs

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.models import for_inference
from diffusiongemma.sampling import Sampler, SamplingConfig, pad_prompts

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'builtin', 'A diffusion student.')
_BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['1', '8'], 'Rows per batch.')
_BATCHES = flags.DEFINE_integer('batches', 16, 'Timed batches per batch size.', lower_bound=2)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 96, 'Maximum tokens of an answer.', lower_bound=1
)
_STEPS = flags.DEFINE_integer('max_denoising_steps', 16, 'Steps per canvas.', lower_bound=1)
_REPETITIONS = flags.DEFINE_integer('repetitions', 9, 'Runs of each timed pass.', lower_bound=1)

MODES = ('autoregressive', 'diffusion', 'lossless')
PROMPT_WIDTH = 128  # one compiled program per mode and batch size
PASSES = 32  # in one timed program


def tokens_per_second(samplers, params, prompts, tokenizer) -> np.ndarray:
    """Returns tokens/s [modes, batches]; modes take turns on every batch, after one to compile."""
    speeds = np.zeros((len(samplers), len(prompts)))
    for i, batch in enumerate([prompts[0], *prompts]):
        tokens, lengths = pad_prompts(batch, tokenizer.pad_id, multiple=PROMPT_WIDTH)
        for mode, sampler in enumerate(samplers):
            start = time.perf_counter()
            output = sampler(params, tokens, lengths, rng=jax.random.key(i))
            count = int(np.sum(jax.block_until_ready(output).lengths))
            if i:
                speeds[mode, i - 1] = count / (time.perf_counter() - start)
    return speeds


def main(argv: list[str]) -> None:
    del argv
    model, params, tokenizer = load_model(_CHECKPOINT.value)
    model, params = for_inference(model, params)
    config = SamplingConfig.for_tokenizer(
        tokenizer,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        max_denoising_steps=_STEPS.value,
        temperature=0.0,
    )
    samplers = [Sampler(model, config, mode) for mode in MODES]
    title = f'{_CHECKPOINT.value} on {jax.devices()[0].device_kind}'
    costs = Table('batch', 'pass', 'ms', 'ratio', title=f'{title}: one pass')
    table = Table('batch', 'mode', 'tok/s', 'ratio', 'quartiles', title=f'{title}: decoding')
    for size in (int(value) for value in _BATCH_SIZES.value):
        examples = eval_examples(
            DataSpec(kind='wordmath', split='test', size=size * _BATCHES.value)
        )
        prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
        batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        first = pad_prompts(batches[0], tokenizer.pad_id, multiple=PROMPT_WIDTH)
        programs = pass_programs(model, params, config, *first, PASSES)
        times = pass_milliseconds(programs, PASSES, _REPETITIONS.value)
        for name, value in times.items():
            ratio = value / times['autoregressive token']
            costs.add_row(str(size), name, f'{value:.2f}', f'{ratio:.2f}x')
        speeds = tokens_per_second(samplers, params, batches, tokenizer)
        for mode, speed in zip(MODES, speeds, strict=True):
            low, ratio, high = np.percentile(speed / speeds[0], [25, 50, 75])
            table.add_row(
                str(size),
                mode,
                f'{np.median(speed):,.0f}',
                f'{ratio:.2f}x',
                f'{low:.2f}-{high:.2f}',
            )
    Console().print(costs, table)


if __name__ == '__main__':
    cli.run_main(main)
