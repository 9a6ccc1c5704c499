"""Answers a prompt, or starts a chat.

python -m diffusiongemma.sample \\
  --prompt="Paul is 17 years old. Omar is 4 years older than Paul. How old is Omar?"
python -m diffusiongemma.sample --prompt="..." --watch --gif=canvas.gif
python -m diffusiongemma.sample
python -m diffusiongemma.sample --checkpoint=builtin-sudoku --watch --prompt="Solve this sudoku:
43__2__9_
259___7_1
8___1925_
_4596___8
___8_4_79
9861_74__
1_4__8963
6__241_8_
57_6____2"

The shipped student answers word problems as above. 'builtin-sudoku' needs the line "Solve this
sudoku:" and nine lines of nine cells, with _ for an empty cell.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath
from rich.console import Console

from diffusiongemma import cli, sampling_flags
from diffusiongemma.checkpoints.load import BUILTIN, about_model
from diffusiongemma.constraints.grammar import from_json_schema, from_regex
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling import Controls, Sampler, decode_responses, pad_prompts
from diffusiongemma.sampling.chat import ChatSampler
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.sampler import MODES, main_mode
from diffusiongemma.sampling.watch import watch
from diffusiongemma.sampling_flags import CHECKPOINT
from diffusiongemma.view.conversation import Conversation
from diffusiongemma.view.frames import Frame, counted, counted_passes, frames
from diffusiongemma.view.page import write_html
from diffusiongemma.view.terminal import show

_PROMPT = flags.DEFINE_string('prompt', None, 'Text to answer; without it, a chat starts.')
_MODE = flags.DEFINE_enum(
    'mode',
    None,
    sorted(MODES),
    "Decode mode; by default 'diffusion', 'lossless' for a light student, 'autoregressive' for a "
    'model without a canvas.',
)
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, 'Sampling temperature; 0 is greedy.', lower_bound=0.0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens',
    None,
    'Maximum number of tokens of an answer; by default as in the evaluation of the student, or '
    '128.',
    lower_bound=1,
)
_TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from the k most likely tokens.', lower_bound=1)
_TOP_P = flags.DEFINE_float(
    'top_p',
    None,
    'Draw from the smallest set of most likely tokens whose total probability reaches this, '
    'in (0, 1].',
)
_REGEX = flags.DEFINE_string('regex', None, 'Regular expression that the answer must match.')
_JSON_SCHEMA = flags.DEFINE_string(
    'json_schema', None, 'File with a JSON schema; the answer is valid JSON under it.'
)
_TURNS = flags.DEFINE_integer(
    'turns',
    None,
    'Number of turns of a chat that the model sees, including the new one; by default 1 for models '
    'that were trained on single questions (the shipped ones and their students), else all that '
    'fit.',
    lower_bound=1,
)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'Seed of the noise and the draws.', lower_bound=0, upper_bound=2**63 - 1
)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON line instead of text.')
_WATCH = flags.DEFINE_bool('watch', False, 'Show every denoise step, colored by entropy.')
_GIF = flags.DEFINE_string('gif', None, 'Write the denoise steps to this file, as a GIF.')
_HTML = flags.DEFINE_string('html', None, 'Write the denoise steps to this file, as a web page.')
_FRAME_SECONDS = flags.DEFINE_float(
    'frame_seconds', 0.35, 'How long --watch, --gif and --html show a step.', lower_bound=0.0
)

_CHAT_TOKENS = 8192  # the maximum length of a conversation, for which its cache is allocated


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, the number of its passes, and the time of a second run without compilation."""

    text: str
    tokens: list[int]
    denoising_steps: int
    tokens_per_denoise_pass: float
    tokens_per_pass: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The sampler, parameters and tokenizer that the flags select."""

    sampler: Sampler
    params: Params
    tokenizer: Tokenizer

    @classmethod
    def from_flags(cls) -> 'Loaded':
        """Loads the model; raises ValueError or FileNotFoundError if this is not possible."""
        model, params, tokenizer = sampling_flags.load()
        if _PROMPT.value is None and not tokenizer.chat_turns:
            raise ValueError(
                f'{CHECKPOINT.value} is a pretrained model, which cannot chat: pass a --prompt to '
                'continue.'
            )
        mode = _MODE.value or main_mode(model)
        sampling_flags.check_mode(mode)
        config = sampling_flags.sampling_config(
            tokenizer,
            temperature=_TEMPERATURE.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
        )
        return cls(Sampler(model, config, mode), params, tokenizer)


def constraint(tokenizer: Tokenizer, vocab_size: int) -> Controls | None:
    """Returns the controls for --regex or --json_schema, or None."""
    if _REGEX.value is not None and _JSON_SCHEMA.value is not None:
        raise ValueError('Give --regex or --json_schema, not both.')
    if _REGEX.value is not None:
        return Controls(automaton=from_regex(_REGEX.value, tokenizer, vocab_size=vocab_size))
    if _JSON_SCHEMA.value is not None:
        schema = epath.Path(_JSON_SCHEMA.value)
        if not schema.is_file():
            raise FileNotFoundError(f'--json_schema={schema}: there is no such file.')
        text = schema.read_text()
        return Controls(automaton=from_json_schema(text, tokenizer, vocab_size=vocab_size))
    return None


def answer(loaded: Loaded, prompt: str, rng: jax.Array, controls: Controls | None) -> Answer:
    """Answers `prompt` twice, first to compile and then to measure the time."""
    sampler, tokenizer = loaded.sampler, loaded.tokenizer
    tokens, lengths = pad_prompts([tokenizer.format_prompt(prompt)], tokenizer.pad_id, multiple=64)
    for _ in range(2):  # the first run includes the compilation
        start = time.perf_counter()
        output = sampler(loaded.params, tokens, lengths, rng=rng, controls=controls)
        jax.block_until_ready(output)
        seconds = time.perf_counter() - start
    (text,) = decode_responses(tokenizer, output)
    return Answer(
        text=text,
        tokens=np.asarray(output.tokens)[0, : int(output.lengths[0])].tolist(),
        denoising_steps=int(output.denoising_steps[0]),
        tokens_per_denoise_pass=float(output.tokens_per_denoise_pass[0]),
        tokens_per_pass=float(output.tokens_per_pass[0]),
        seconds=seconds,
    )


def show_steps(loaded: Loaded, prompt: str, rng: jax.Array, controls: Controls | None) -> None:
    """Shows or writes the denoise steps for --watch, --gif and --html.

    The tokens/s in the frames are lower than in normal sampling, because every step is one call.
    """
    if _GIF.value is not None:
        from diffusiongemma.view import animation  # fails early if the extra `view` is missing
    sampler, params, tokenizer = loaded.sampler, loaded.params, loaded.tokenizer
    tokens, lengths = pad_prompts([tokenizer.format_prompt(prompt)], tokenizer.pad_id)

    def steps() -> Iterator[Frame]:
        drafts = watch(sampler, params, tokens, lengths, rng=rng, controls=controls)
        return frames(drafts, tokenizer, sampler.config.stop_ids)

    for _ in steps():  # compiles
        pass
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    shown = show(steps(), console, prompt, _FRAME_SECONDS.value) if _WATCH.value else list(steps())
    if _GIF.value is not None:
        animation.write_gif(Path(_GIF.value), shown, prompt, _FRAME_SECONDS.value)
    if _HTML.value is not None:
        write_html(Path(_HTML.value), shown, prompt, _FRAME_SECONDS.value)


def answers_single_questions(checkpoint: str) -> bool:
    """Returns whether a model was trained on single questions: shipped ones and their students."""
    return checkpoint in BUILTIN or about_model(checkpoint).get('teacher') in BUILTIN


def chat(loaded: Loaded, rng: jax.Array) -> None:
    """Runs a conversation on standard input and output."""
    capacity = min(traits(loaded.sampler.model).max_positions or _CHAT_TOKENS, _CHAT_TOKENS)
    turns = _TURNS.value or (1 if answers_single_questions(CHECKPOINT.value) else None)
    chat = ChatSampler(
        loaded.sampler,
        loaded.params,
        loaded.tokenizer,
        rng=rng,
        capacity=capacity,
        max_turns=turns,
    )
    talks_to_person = sys.stdin.isatty()
    if talks_to_person:
        import readline  # noqa: F401  adds line editing and history to input()

        print(f'{CHECKPOINT.value}, mode {loaded.sampler.mode}; /help names the commands.')
        if turns == 1:
            print('The model sees one question at a time: each starts a new conversation.')
        print('The first answers take longer: they compile.')

    def write(text: str) -> None:
        print(text, end='', flush=True)

    Conversation(chat, lambda: input('> ' if talks_to_person else ''), write).run()


def main(argv: list[str]) -> None:
    """Answers the prompt, shows its denoise steps, or runs a chat."""
    del argv
    watched = _WATCH.value or _GIF.value is not None or _HTML.value is not None
    if _JSON.value and _WATCH.value:
        raise ValueError('Give --json or --watch, not both.')
    if _PROMPT.value is None and (watched or _JSON.value or _REGEX.value or _JSON_SCHEMA.value):
        raise ValueError(
            '--watch, --gif, --html, --json, --regex and --json_schema need a --prompt; '
            'without one this is a chat.'
        )
    if _PROMPT.value is not None and not _PROMPT.value.strip():
        raise ValueError('--prompt is empty: give a text to answer, or leave it out for a chat.')
    for name, path in (('gif', _GIF.value), ('html', _HTML.value)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f'--{name}={path}: there is no directory {Path(path).parent}.')
    cli.say_devices()
    loaded, rng = Loaded.from_flags(), jax.random.key(_SEED.value)
    prompt = _PROMPT.value
    if prompt is None:
        chat(loaded, rng)
        return
    controls = constraint(loaded.tokenizer, loaded.sampler.model.config.vocab_size)
    if watched:
        show_steps(loaded, prompt, rng, controls)
    result = answer(loaded, prompt, rng, controls)
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(result.text)
    print(
        f'[{counted(len(result.tokens), "token")}, '
        f'{counted_passes(result.denoising_steps, loaded.sampler.mode)}, '
        f'{result.tokens_per_pass:.2f} tokens per pass (commits and verifications counted), '
        f'{len(result.tokens) / result.seconds:,.0f} tokens/s]'
    )


if __name__ == '__main__':
    # A chat handles Ctrl-C itself: it stops the answer, not the program.
    cli.run_main(main, is_interruptible=lambda: _PROMPT.value is not None)
