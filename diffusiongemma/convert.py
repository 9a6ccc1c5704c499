"""Converts a model to the published format (for transformers), or into a bundle.

python -m diffusiongemma.convert --input=builtin-teacher --output=/tmp/teacher --format=hf
"""

from pathlib import Path

import jax.numpy as jnp
from absl import flags

from diffusiongemma import cli
from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.hf_export import MAX_SHARD_BYTES
from diffusiongemma.checkpoints.int8_storage import INT8
from diffusiongemma.sampling import SamplingConfig
from diffusiongemma.sampling.published import generation_config

_INPUT = flags.DEFINE_string(
    'input', None, "A workdir, a bundle, a published checkpoint, 'builtin' or 'builtin-teacher'."
)
_OUTPUT = flags.DEFINE_string('output', None, 'The directory to create.')
_FORMAT = flags.DEFINE_enum(
    'format', 'hf', ['hf', 'bundle'], "'hf' for transformers, or 'bundle' for this library."
)
_DTYPE = flags.DEFINE_enum(
    'dtype',
    None,
    ['float32', 'bfloat16', INT8],
    'Dtype to cast the parameters to; int8 is only for bundles; by default they keep theirs.',
)
_MAX_SHARD_GB = flags.DEFINE_float(
    'max_shard_gb', MAX_SHARD_BYTES / 1e9, 'Largest file of the output in 10^9 bytes (hf).', 1e-6
)
_BASE = flags.DEFINE_string(
    'base',
    None,
    'Published checkpoint that supplies what a bundle does not contain: vision tower, tokenizer '
    'files, token ids (hf). Default: the input, if it is one.',
)


def main(argv: list[str]) -> None:
    """Converts a model."""
    del argv
    convert(
        cli.required('input', _INPUT.value),
        cli.output_directory('output', _OUTPUT.value),
        _FORMAT.value,
        dtype=jnp.dtype(_DTYPE.value) if _DTYPE.value not in (None, INT8) else _DTYPE.value,
        max_shard_bytes=int(_MAX_SHARD_GB.value * 1e9),
        base=Path(_BASE.value) if _BASE.value else None,
        generation=lambda config: generation_config(SamplingConfig(), config.is_diffusion),
    )
    print(
        f'{_FORMAT.value}: {_OUTPUT.value}  next: python -m diffusiongemma.sample '
        f'--checkpoint={_OUTPUT.value} --prompt=...'
    )


if __name__ == '__main__':
    flags.mark_flags_as_required(['input', 'output'])
    cli.run_main(main)
