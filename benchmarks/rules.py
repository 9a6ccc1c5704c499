"""Measures the problems solved and the passes taken by acceptance rules on shipped students.

    python benchmarks/rules.py --checkpoint=builtin-sudoku --problems=64 \\
        --acceptance='EntropyBound(0.01)' --acceptance='Remask(EntropyBound(0.1), 8)'

The table has a row for each rule, on held-out problems of the student's evaluation and with its
settings except for the rule and the flags. With --sampled the candidates are drawn at temperature
1, all steps are taken and the canvas itself is committed, as with `SamplingConfig.ancestral`.
"""

import dataclasses

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_for_sampling
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.evaluation.tasks import is_correct
from diffusiongemma.sampling import Never, Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.randomness import row_keys

_CHECKPOINT = flags.DEFINE_enum(
    'checkpoint', 'builtin', ['builtin', 'builtin-sudoku'], 'A shipped diffusion student.'
)
_PROBLEMS = flags.DEFINE_integer('problems', 64, 'Held-out problems.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch_size', 64, 'Rows at once.', lower_bound=1)
_RULES = flags.DEFINE_multi_string('acceptance', ['EntropyBound(0.1)'], 'A rule; may be repeated.')
_STEPS = flags.DEFINE_integer(
    'max_denoising_steps',
    None,
    'Maximum number of steps per canvas; by default as in the evaluation of the student.',
    lower_bound=1,
)
_SAMPLED = flags.DEFINE_bool('sampled', False, 'Draw at temperature 1 and take all steps.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise and the draws.')

SOURCES = {
    'builtin': DataSpec(kind='wordmath', split='test'),
    'builtin-sudoku': DataSpec(kind='sudoku', split='test', min_clues=30, max_clues=45),
}


def main(argv: list[str]) -> None:
    del argv
    model, params, tokenizer = load_for_sampling(_CHECKPOINT.value, None)
    source = dataclasses.replace(SOURCES[_CHECKPOINT.value], size=_PROBLEMS.value)
    examples = eval_examples(source)
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    tokens, lengths = pad_prompts(prompts, tokenizer.pad_id, multiple=16)
    keys = row_keys(jax.random.key(_SEED.value), len(prompts))
    table = Table('rule', 'solved', 'passes per canvas', 'canvases per answer')
    for rule in _RULES.value:
        config = cli.student_sampling(
            _CHECKPOINT.value, tokenizer, acceptance=rule, max_denoising_steps=_STEPS.value
        )
        if _SAMPLED.value:
            exact = {'temperature': 1.0, 't_min': 1.0, 't_max': 1.0, 'commits': 'canvas'}
            exact |= {'stopping': Never(), 'stability_threshold': None}
            config = dataclasses.replace(config, **exact)
        sampler, solved, costs = Sampler(model, config), 0, np.zeros(2, int)
        for first in range(0, len(prompts), _BATCH.value):
            rows = slice(first, first + _BATCH.value)
            output = sampler(params, tokens[rows], lengths[rows], rng=keys[rows])
            answers = decode_responses(tokenizer, output)
            solved += sum(map(is_correct, examples[rows], answers))
            costs += [int(output.denoising_steps.sum()), int(output.canvases.sum())]
        passes, canvases = costs
        share = f'{solved} of {len(prompts)} ({solved / len(prompts):.1%})'
        each = f'{canvases / len(prompts):.2f}'
        table.add_row(repr(config.acceptance_rule), share, f'{passes / canvases:.2f}', each)
    Console(width=120).print(table)


if __name__ == '__main__':
    cli.run_main(main)
