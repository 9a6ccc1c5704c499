"""Answers a prompt, or talks.

python -m diffusiongemma.sample --prompt="Mia has 12 apples. She buys 3 more. How many now?"
python -m diffusiongemma.sample --prompt="..." --watch --gif=canvas.gif
python -m diffusiongemma.sample
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath
from rich.console import Console

from diffusiongemma import run_config
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.constraints.grammar import from_json_schema, from_regex
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models import for_inference, quantize_weights
from diffusiongemma.models.quantization import WEIGHT_DTYPES
from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, generate_text, pad_prompts
from diffusiongemma.sampling.chat import ChatSampler
from diffusiongemma.sampling.sampler import MODES, main_mode
from diffusiongemma.sampling.watch import watch
from diffusiongemma.view.animation import write_gif, write_html
from diffusiongemma.view.conversation import Conversation
from diffusiongemma.view.frames import frames
from diffusiongemma.view.terminal import show

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    'builtin',
    "A workdir, a bundle, a published checkpoint, a GGUF file, 'builtin', or 'gemma3-270m'.",
)
_PROMPT = flags.DEFINE_string('prompt', None, 'What to answer; without it, a chat.')
_MODE = flags.DEFINE_enum(
    'mode',
    None,
    sorted(MODES),
    "Decode mode; by default 'diffusion', 'lossless' for a light student, 'autoregressive' for a "
    'model without a canvas.',
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
_WEIGHTS = flags.DEFINE_enum(
    'weights', None, sorted(WEIGHT_DTYPES), 'Weights of eight bits, products as before.'
)
_REGEX = flags.DEFINE_string('regex', None, 'The answer matches this regular expression.')
_JSON_SCHEMA = flags.DEFINE_string(
    'json_schema', None, 'A file; the answer is JSON of this schema.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the noise and the draws.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON line instead of text.')
_WATCH = flags.DEFINE_bool('watch', False, 'Show every denoise step, coloured by entropy.')
_GIF = flags.DEFINE_string('gif', None, 'Write the denoise steps to this file, as a GIF.')
_HTML = flags.DEFINE_string('html', None, 'Write the denoise steps to this file, as a web page.')
_FRAME_SECONDS = flags.DEFINE_float(
    'frame_seconds', 0.35, 'How long --watch, --gif and --html show a step.', lower_bound=0.0
)

_CHAT_TOKENS = 8192  # the longest conversation; its cache is made for so many


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and its cost; `seconds` is a second run, without compilation."""

    text: str
    tokens: list[int]
    denoising_steps: int
    tokens_per_denoise_pass: float
    tokens_per_pass: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What the flags ask for: a sampler, its parameters and its tokenizer."""

    sampler: Sampler
    params: dict
    tokenizer: Tokenizer

    @classmethod
    def from_flags(cls) -> 'Loaded':
        """Raises ValueError or FileNotFoundError where the checkpoint is of no use."""
        model, params, tokenizer = load_model(_CHECKPOINT.value)
        if tokenizer is None:
            raise ValueError(
                f'{_CHECKPOINT.value} has no tokenizer.model or tokenizer.json; copy one there.'
            )
        if _PROMPT.value is None and not tokenizer.chat_turns:
            raise ValueError(
                f'{_CHECKPOINT.value} is a pretrained model, which cannot talk: give it a --prompt '
                'to continue.'
            )
        model, params = for_inference(model, params)
        if _WEIGHTS.value is not None:
            params = quantize_weights(model, params, _WEIGHTS.value)
        config = SamplingConfig.for_tokenizer(
            tokenizer,
            temperature=_TEMPERATURE.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            max_denoising_steps=_MAX_STEPS.value,
            entropy_bound=_ENTROPY_BOUND.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
        )
        return cls(Sampler(model, config, _MODE.value or main_mode(model)), params, tokenizer)


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


def answer(loaded: Loaded, prompt: str, rng: jax.Array, controls: Controls | None) -> Answer:
    """Answers `prompt` twice, the second time to measure it."""
    sampler, params, tokenizer = loaded.sampler, loaded.params, loaded.tokenizer

    def run():
        result = generate_text(sampler, params, tokenizer, [prompt], rng=rng, controls=controls)
        return jax.block_until_ready(result)

    run()  # compiles
    start = time.perf_counter()
    (text,), output = run()
    seconds = time.perf_counter() - start
    return Answer(
        text=text,
        tokens=np.asarray(output.tokens)[0, : int(output.lengths[0])].tolist(),
        denoising_steps=int(output.denoising_steps[0]),
        tokens_per_denoise_pass=float(output.tokens_per_denoise_pass[0]),
        tokens_per_pass=float(output.tokens_per_pass[0]),
        seconds=seconds,
    )


def show_steps(loaded: Loaded, prompt: str, rng: jax.Array, controls: Controls | None) -> None:
    """What --watch, --gif and --html ask for; the tokens/s are those of single steps."""
    sampler, params, tokenizer = loaded.sampler, loaded.params, loaded.tokenizer
    tokens, lengths = pad_prompts([tokenizer.format_prompt(prompt)], tokenizer.pad_id)

    def steps():
        drafts = watch(sampler, params, tokens, lengths, rng=rng, controls=controls)
        return frames(drafts, tokenizer, sampler.config.stop_ids)

    for _ in steps():  # compiles
        pass
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    shown = show(steps(), console, prompt, _FRAME_SECONDS.value) if _WATCH.value else list(steps())
    for path, write in ((_GIF.value, write_gif), (_HTML.value, write_html)):
        if path is not None:
            write(Path(path), shown, prompt, _FRAME_SECONDS.value)


def chat(loaded: Loaded, rng: jax.Array) -> None:
    """A conversation on standard input and output."""
    capacity = min(loaded.sampler.model.config.max_positions or _CHAT_TOKENS, _CHAT_TOKENS)
    chat = ChatSampler(loaded.sampler, loaded.params, loaded.tokenizer, rng=rng, capacity=capacity)
    talks_to_person = sys.stdin.isatty()
    if talks_to_person:
        import readline  # noqa: F401  input() then edits lines and remembers them

        print(f'{_CHECKPOINT.value}, mode {loaded.sampler.mode}; /help names the commands.')
        print('The first answers take longer: they compile.')

    def write(text: str) -> None:
        print(text, end='', flush=True)

    Conversation(chat, lambda: input('> ' if talks_to_person else ''), write).run()


def main(argv: list[str]) -> None:
    del argv
    watched = _WATCH.value or _GIF.value is not None or _HTML.value is not None
    if _JSON.value and _WATCH.value:
        raise ValueError('Give --json or --watch, not both.')
    if _PROMPT.value is None and (watched or _JSON.value or _REGEX.value or _JSON_SCHEMA.value):
        raise ValueError(
            '--watch, --gif, --html, --json, --regex and --json_schema need a --prompt; '
            'without one this is a chat.'
        )
    loaded, rng = Loaded.from_flags(), jax.random.key(_SEED.value)
    if _PROMPT.value is None:
        return chat(loaded, rng)
    controls = constraint(loaded.tokenizer, loaded.sampler.model.config.vocab_size)
    if watched:
        show_steps(loaded, _PROMPT.value, rng, controls)
    result = answer(loaded, _PROMPT.value, rng, controls)
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(result.text)
    print(
        f'[{len(result.tokens)} tokens, {result.denoising_steps} denoise passes, '
        f'{result.tokens_per_pass:.2f} tokens per pass (commits and verifications counted), '
        f'{len(result.tokens) / result.seconds:,.0f} tokens/s]'
    )


if __name__ == '__main__':
    run_config.run_main(main)
