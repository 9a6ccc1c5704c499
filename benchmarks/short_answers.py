"""Tests whether stopping rules suppress very short answers.

    python benchmarks/short_answers.py --checkpoint=builtin

A canvas with a short answer is mostly padding, which a model predicts with certainty, so a mean
over the canvas can be low although the answer is uncertain. The prompts are held-out word problems
with the teacher's answer except its last few tokens, so that only a short answer is left. The table
has a row for each number of remaining tokens and each stopping rule: how many continuations equal
the teacher's, how many are empty (only the stop token), and the denoise steps per canvas.
"""

import dataclasses

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.sampling import (
    AllOf,
    MeanEntropy,
    Never,
    Sampler,
    SamplingConfig,
    StableAndConfident,
    TokenStability,
    pad_prompts,
)

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'builtin', 'A diffusion student.')
_PROBLEMS = flags.DEFINE_integer('problems', 256, 'Held-out word problems.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch_size', 64, 'Rows at once.', lower_bound=1)
_LEFT = flags.DEFINE_list(
    'tokens_left', ['2', '3', '5'], 'Numbers of remaining answer tokens, including the stop token.'
)

WIDTH = 192
RULES = {
    'stable and confident (default)': StableAndConfident(),
    'confident on average': MeanEntropy(),
    'stable for two steps': TokenStability(2),
    'all of these': AllOf((StableAndConfident(), TokenStability(2))),
    'never': Never(),
}


def responses(sampler, params, prompts, pad_id):
    """Returns token lists of the responses, and denoise steps per canvas."""
    rows, steps, canvases = [], 0, 0
    for first in range(0, len(prompts), _BATCH.value):
        tokens, lengths = pad_prompts(prompts[first : first + _BATCH.value], pad_id, width=WIDTH)
        output = sampler(params, tokens, lengths, rng=jax.random.key(first))
        counts = np.asarray(output.lengths)
        rows += [row[:n].tolist() for row, n in zip(np.asarray(output.tokens), counts, strict=True)]
        steps, canvases = steps + output.denoising_steps.sum(), canvases + output.canvases.sum()
    return rows, float(steps / np.maximum(canvases, 1))


def main(argv: list[str]) -> None:
    del argv
    model, params, tokenizer = load_model(_CHECKPOINT.value)
    config = SamplingConfig.for_tokenizer(
        tokenizer, max_new_tokens=96, temperature=0.0, max_denoising_steps=16
    )
    examples = eval_examples(DataSpec(kind='wordmath', split='test', size=_PROBLEMS.value))
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    teacher = Sampler(model, config, 'autoregressive')
    answers, _ = responses(teacher, params, prompts, tokenizer.pad_id)
    table = Table('tokens left', 'stopping rule', 'as the teacher', 'empty', 'steps per canvas')
    for left in map(int, _LEFT.value):
        cut = [prompt + answer[:-left] for prompt, answer in zip(prompts, answers, strict=True)]
        for name, rule in RULES.items():
            sampler = Sampler(model, dataclasses.replace(config, stopping=rule))
            ends, steps = responses(sampler, params, cut, tokenizer.pad_id)
            same = [a[-left:] == b for a, b in zip(answers, ends, strict=True)]
            empty = [len(end) <= 1 for end in ends]
            table.add_row(
                str(left), name, f'{np.mean(same):.1%}', f'{np.mean(empty):.1%}', f'{steps:.2f}'
            )
    Console().print(table)


if __name__ == '__main__':
    cli.run_main(main)
