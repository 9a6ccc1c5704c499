"""Reads the tokenizer of a checkpoint in the published format."""

from pathlib import Path

from diffusiongemma.checkpoints.bundle import TOKENIZER_FILE
from diffusiongemma.checkpoints.hf_config import read_hf_config
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.config import ModelConfig

TOKENIZER_JSON = 'tokenizer.json'  # in a published checkpoint without tokenizer.model


def has_empty_thought(config: ModelConfig) -> bool:
    """Returns whether a prompt without thoughts ends in an empty thought channel.

    It does not for the Gemma 4 models with per-layer embeddings (E2B, E4B). A chat template, if
    there is one, takes precedence.
    """
    return config.per_layer is None


def published_tokenizer(directory: Path) -> Tokenizer | None:
    """Returns the tokenizer of a published checkpoint, or None if it has none.

    A checkpoint with a tokenizer_config.json but no chat template is a pretrained model.

    Raises:
      ValueError: if the tokenizer has more tokens than the model.
    """
    names = (TOKENIZER_FILE, TOKENIZER_JSON)
    files = [directory / name for name in names if (directory / name).exists()]
    if not files:
        return None
    model_config = read_hf_config(directory)
    tokenizer = Tokenizer.load(str(files[0]), has_empty_thought(model_config))
    vocab_size = model_config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f'{files[0]} has {tokenizer.vocab_size} tokens, the model {vocab_size}; '
            'copy both from one checkpoint.'
        )
    config = directory / 'tokenizer_config.json'
    if config.exists() and not any(directory.glob('chat_template.*')):
        if not read_json(config).get('chat_template'):
            return tokenizer.without_chat_turns()
    return tokenizer
