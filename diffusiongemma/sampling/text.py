"""From text to text: tokenise prompts, sample, decode."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.sampler import Sampler, pad_prompts
from diffusiongemma.sampling.state import SamplerOutput


def generate_text(
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    rng: jax.Array,
    system: str | None = None,
    multiple: int = 64,
    controls: Controls | None = None,
) -> tuple[list[str], SamplerOutput]:
    """Answers each prompt as the model's turn of a conversation.

    A pretrained model (`Tokenizer.chat_turns` is False) continues each prompt as plain text.

    Args:
      sampler: made with `SamplingConfig.for_tokenizer(tokenizer)`.
      params: the model's parameters.
      tokenizer: the model's tokenizer.
      prompts: one user turn each; they form one batch.
      rng: one key, or one per prompt.
      system: system text of all prompts.
      multiple: prompts are padded to a multiple of it.
      controls: settings and constraints of the rows.

    Returns:
      The answers, without thoughts and turn end, and the sampler's output.

    Raises:
      ValueError: when the sampler would not stop at the tokenizer's end of turn, or when
        there are no prompts.
    """
    check_stops(sampler, tokenizer)
    formatted = [tokenizer.format_prompt(prompt, system) for prompt in prompts]
    tokens, lengths = pad_prompts(formatted, tokenizer.pad_id, multiple=multiple)
    output = sampler(params, tokens, lengths, rng=rng, controls=controls)
    return decode_responses(tokenizer, output), output


def check_stops(sampler: Sampler, tokenizer: Tokenizer) -> None:
    """Raises ValueError when the sampler would not stop at the tokenizer's end of turn."""
    missing = sorted(set(tokenizer.stop_ids) - set(sampler.config.stop_ids))
    if missing:
        raise ValueError(
            f'stop_ids={sampler.config.stop_ids} of the sampling config lack {missing}, with '
            'which this tokenizer ends a turn. Make it with SamplingConfig.for_tokenizer.'
        )


def decode_responses(tokenizer: Tokenizer, output: SamplerOutput) -> list[str]:
    """Returns the text of each row's answer.

    What a model writes into its thought channel is not part of it, not even where the channel is
    never closed; `ChatSampler` and `Tokenizer.split_thoughts` give it. Special tokens, the stop
    token among them, are skipped.
    """
    rows, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    return [
        tokenizer.decode(tokenizer.split_thoughts(row[:length].tolist())[1])
        for row, length in zip(rows, lengths, strict=True)
    ]
