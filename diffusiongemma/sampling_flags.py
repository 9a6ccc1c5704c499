"""Flags of the commands that sample: the model, and how it denoises and drafts."""

from typing import Any

from absl import flags

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_for_sampling
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.inference import WEIGHT_DTYPES
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.sampling.config import SamplingConfig

CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    'builtin',
    "A workdir, a bundle, a published checkpoint, a GGUF file, 'builtin', 'gemma3-270m' or "
    "'gemma3-270m-student'.",
)
_WEIGHTS = flags.DEFINE_enum('weights', None, sorted(WEIGHT_DTYPES), 'Weight-only quantization.')
_MAX_STEPS = flags.DEFINE_integer(
    'max_denoising_steps',
    None,
    'Maximum number of denoise steps per canvas; by default as in the evaluation of the student, '
    'or 48.',
    lower_bound=1,
)
_ENTROPY_BOUND = flags.DEFINE_float(
    'entropy_bound',
    None,
    'Entropy bound in nats; a higher one accepts more tokens per denoise step; by default as in '
    'the evaluation of the student, or 0.1.',
    lower_bound=0.0,
)
_ACCEPTANCE = flags.DEFINE_string(
    'acceptance',
    None,
    "Acceptance rule of denoise steps, such as 'TopK(k=4)', instead of an entropy bound; see "
    'docs/sampling.md.',
)
_DRAFTS = flags.DEFINE_string(
    'drafts',
    None,
    "Source of drafts in the lossless mode, such as 'PromptLookup(length=8)'; by default the "
    "model's denoiser.",
)
_DRAFT_LENGTH = flags.DEFINE_integer(
    'draft_length',
    None,
    'Number of tokens of a draft in the lossless mode; by default as in the evaluation of the '
    'student, or the canvas length.',
    lower_bound=2,
)
_LOOKUP_NGRAM = flags.DEFINE_integer(
    'lookup_ngram',
    None,
    'In the lossless mode, copy a draft from earlier text if at least this many last tokens occur '
    'there; 0 disables it; by default as in the evaluation of the student, or 0.',
    lower_bound=0,
)
# The flags that have an effect in some modes only.
_OF_MODES = {
    ('diffusion', 'lossless'): (_MAX_STEPS, _ENTROPY_BOUND, _ACCEPTANCE),
    ('lossless',): (_DRAFTS, _DRAFT_LENGTH, _LOOKUP_NGRAM),
}


def load() -> tuple[Gemma, Params, Tokenizer]:
    """Opens the model of --checkpoint, see `load_for_sampling`."""
    return load_for_sampling(CHECKPOINT.value, _WEIGHTS.value)


def check_mode(mode: str) -> None:
    """Checks that all flags that are set have an effect in this mode.

    Raises:
      ValueError: if one has none.
    """
    for modes, of_modes in _OF_MODES.items():
        for flag in of_modes:
            if flag.value is not None and mode not in modes:
                raise ValueError(f'--{flag.name} has no effect in the mode {mode!r}; leave it out.')


def sampling_config(tokenizer: Tokenizer, **others: Any) -> SamplingConfig:
    """Returns the settings of the flags, see `cli.student_sampling`.

    Args:
      tokenizer: the tokenizer of the model.
      **others: other fields of `SamplingConfig`.

    Raises:
      ValueError: if a field is out of range, or two flags contradict each other.
    """
    if _DRAFTS.value is not None and _DRAFT_LENGTH.value is not None:
        raise ValueError(
            f'--draft_length={_DRAFT_LENGTH.value} has no effect with --drafts={_DRAFTS.value}, '
            'which has a length of its own; leave one of them out.'
        )
    sampler_flags = (*_OF_MODES[('diffusion', 'lossless')], *_OF_MODES[('lossless',)])
    fields = {flag.name: flag.value for flag in sampler_flags} | others
    return cli.student_sampling(CHECKPOINT.value, tokenizer, **fields)
