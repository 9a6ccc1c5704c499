"""Answers a prompt.

python -m diffusiongemma.sample --prompt="Mia has 12 apples. She buys 3 more. How many now?"
"""

import dataclasses
import json
import time

import jax
import numpy as np
from absl import flags
from etils import epath

from diffusiongemma import run_config
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, generate_text
from diffusiongemma.sampling.grammar import from_json_schema, from_regex

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'builtin', "A workdir, a bundle, a published checkpoint, or 'builtin'."
)
_PROMPT = flags.DEFINE_string('prompt', None, 'What to answer.')
_MODE = flags.DEFINE_enum(
    'mode', 'diffusion', ['diffusion', 'autoregressive', 'lossless'], 'Decode mode.'
)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 is greedy.', lower_bound=0.0)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 128, 'Longest answer in tokens.', lower_bound=1
)
_MAX_STEPS = flags.DEFINE_integer(
    'max_denoising_steps', 48, 'Most denoise steps per canvas.', lower_bound=1
)
_ENTROPY_BOUND = flags.DEFINE_float(
    'entropy_bound',
    0.1,
    'Nats; a higher one accepts more tokens per denoise step.',
    lower_bound=0.0,
)
_TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from the k likeliest tokens.', lower_bound=1)
_TOP_P = flags.DEFINE_float(
    'top_p', None, 'Draw from the likeliest tokens of this probability.', 0.0, 1.0
)
_REGEX = flags.DEFINE_string('regex', None, 'The answer matches this regular expression.')
_JSON_SCHEMA = flags.DEFINE_string(
    'json_schema', None, 'A file; the answer is JSON of this schema.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the noise and the draws.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON line instead of text.')


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and its cost; `seconds` is a second run, without compilation."""

    text: str
    tokens: list[int]
    denoising_steps: int
    tokens_per_forward: float
    seconds: float


def constraint(tokenizer: Tokenizer, vocab_size: int) -> Controls | None:
    """What --regex or --json_schema ask for."""
    if _REGEX.value is not None and _JSON_SCHEMA.value is not None:
        raise ValueError('Give --regex or --json_schema, not both.')
    if _REGEX.value is not None:
        return Controls(automaton=from_regex(_REGEX.value, tokenizer, vocab_size=vocab_size))
    if _JSON_SCHEMA.value is not None:
        schema = epath.Path(_JSON_SCHEMA.value).read_text()
        return Controls(automaton=from_json_schema(schema, tokenizer, vocab_size=vocab_size))
    return None


def answer(checkpoint: str, prompt: str, mode: str, seed: int, **settings: float | None) -> Answer:
    """Answers `prompt`; `settings` are fields of `SamplingConfig`."""
    model, params, tokenizer = load_model(checkpoint)
    if tokenizer is None:
        raise ValueError(f'{checkpoint} has no tokenizer.model; copy it there.')
    sampler = Sampler(model, SamplingConfig.for_tokenizer(tokenizer, **settings), mode)
    arguments = {
        'rng': jax.random.key(seed),
        'controls': constraint(tokenizer, model.config.vocab_size),
    }

    def run():
        result = generate_text(sampler, params, tokenizer, [prompt], **arguments)
        return jax.block_until_ready(result)

    run()  # compiles
    start = time.perf_counter()
    (text,), output = run()
    seconds = time.perf_counter() - start
    return Answer(
        text=text,
        tokens=np.asarray(output.tokens)[0, : int(output.lengths[0])].tolist(),
        denoising_steps=int(output.denoising_steps[0]),
        tokens_per_forward=float(output.tokens_per_forward[0]),
        seconds=seconds,
    )


def main(argv: list[str]) -> None:
    del argv
    result = answer(
        _CHECKPOINT.value,
        _PROMPT.value,
        _MODE.value,
        _SEED.value,
        temperature=_TEMPERATURE.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        max_denoising_steps=_MAX_STEPS.value,
        entropy_bound=_ENTROPY_BOUND.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
    )
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(result.text)
    print(
        f'[{len(result.tokens)} tokens, {result.denoising_steps} forward passes, '
        f'{result.tokens_per_forward:.2f} tokens per forward, '
        f'{len(result.tokens) / result.seconds:,.0f} tokens/s]'
    )


if __name__ == '__main__':
    flags.mark_flag_as_required('prompt')
    run_config.run_main(main)
