r"""Trains the small tokenizer that ships with the library, on the built-in tasks.

python -m diffusiongemma.data.train_tokenizer --output=diffusiongemma/assets/tokenizer.model
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import sentencepiece
from absl import app, flags, logging
from etils import epath

from diffusiongemma.data.special_tokens import TURN_PIECES
from diffusiongemma.data.tasks import sudoku, wordmath
from diffusiongemma.data.tokenizer import Tokenizer

_OUTPUT = flags.DEFINE_string('output', None, 'Path of the .model file to write.', required=True)
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 1024, 'Number of pieces.')
_NUM_EXAMPLES = flags.DEFINE_integer('num_examples', 24_000, 'Training problems to learn from.')

ROLES = ('user', 'model', 'system')
SPECIAL_PIECES = ('<mask>', *TURN_PIECES[0], '<|channel>', '<channel|>')
# These pieces are never part of longer ones, so a sudoku cell is one token. A digit includes the
# space before it, which saves one token per number while every digit stays a separate token.
TEXT_PIECES = ('\n', '_', *(f'\u2581{digit}' for digit in range(10)))


def corpus(num_examples: int) -> Iterator[str]:
    """Yields lines of training text: word problems and, after each 20th, a sudoku and the roles."""
    for index in range(num_examples):
        example = wordmath.generate(index, 'train')
        yield example['prompt']
        yield example['response']
        if index % 20 == 0:
            puzzle = sudoku.generate(index, 'train', size=4)
            yield from f'{puzzle["prompt"]}\n{puzzle["response"]}'.split('\n')
            yield from ROLES


def train(num_examples: int, vocab_size: int = 1024) -> bytes:
    """Trains a tokenizer on the built-in tasks; the same arguments give the same model.

    Args:
      num_examples: the number of word problems to learn from.
      vocab_size: the number of pieces, of which 256 are bytes and 21 are special.

    Returns:
      The content of a .model file.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(num_examples),
        model_writer=model,
        model_type='bpe',  # the lexicon is too small for a unigram model of this size
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece='<pad>',
        eos_piece='<eos>',
        bos_piece='<bos>',
        user_defined_symbols=[*SPECIAL_PIECES, *TEXT_PIECES],
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        # Decoding returns the input: no normalization, no added or removed spaces.
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main(argv: Sequence[str]) -> None:
    """Trains a tokenizer and writes it."""
    del argv
    model = train(_NUM_EXAMPLES.value, _VOCAB_SIZE.value)
    output = epath.Path(_OUTPUT.value)
    tokenizer = Tokenizer(model, str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model)
    logging.info('Wrote %s with %d pieces.', tokenizer, tokenizer.vocab_size)


if __name__ == '__main__':
    app.run(main)
