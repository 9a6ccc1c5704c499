"""Stage 0 of Diffuse-Distill: the teacher writes the responses that the student learns.

Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947): greedy teacher outputs
are more predictable than the data, which is what a parallel decoder needs.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.sampling import Sampler, SamplingConfig, decode_responses, pad_prompts


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
    """What the teacher answers.

    Attributes:
      source: the prompts; their own responses are not used, unless `sequence_level` is off.
      batch_size: prompts answered at once.
      max_new_tokens: longest answer; a longer one is left out, never cut.
      temperature: 0 for greedy answers.
      prompt_multiple: prompts are padded to a multiple of this.
      sequence_level: the student learns the teacher's answers. Off, for an ablation or where the
        source's own responses are what the teacher would say: it learns those, and nothing is
        written.
    """

    source: DataSpec
    batch_size: int = 128
    max_new_tokens: int = 256
    temperature: float = 0.0
    prompt_multiple: int = 64
    sequence_level: bool = True

    def __post_init__(self):
        if not isinstance(self.source, DataSpec):
            object.__setattr__(self, 'source', DataSpec.from_config(self.source))
        if self.batch_size < 1:
            raise ValueError(f'batch_size must be >= 1, got {self.batch_size}.')


SHARD_SIZE = 1024  # prompts per file


def write_targets(
    model: Gemma,
    params: Any,
    tokenizer: Tokenizer,
    config: TargetsConfig,
    directory: Path,
    *,
    seed: int,
) -> DataSpec:
    """Writes the teacher's answers as JSONL shards and returns how to read them.

    Shards appear complete or not at all, and complete ones are kept: an interrupted call is
    finished by calling it again.

    Args:
      model: the teacher.
      params: its parameters.
      tokenizer: its tokenizer.
      config: what it answers.
      directory: where targets.jsonl and its shards go.
      seed: of the draws, where the temperature is not 0. An answer depends on the seed and
        its prompt's index alone.

    Raises:
      ValueError: the directory holds targets that were made otherwise, or no answer ended
        within max_new_tokens.
    """
    if not config.sequence_level:
        return config.source
    directory.mkdir(parents=True, exist_ok=True)
    _check_made_alike(directory / 'made_from.json', _fingerprint(params, tokenizer, config, seed))
    complete = directory / 'targets.jsonl'
    if not complete.exists():
        source = load_source(config.source)
        sampling = SamplingConfig.for_tokenizer(
            tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature
        )
        sampler = Sampler(model, sampling, mode='autoregressive')
        shards = []
        for first in range(0, len(source), SHARD_SIZE):
            shard = directory / f'shard-{first:09d}.jsonl'
            shards.append(shard)
            if not shard.exists():
                indices = range(first, min(first + SHARD_SIZE, len(source)))
                rows = _answer(sampler, params, tokenizer, source, indices, config, seed)
                _write_atomically(shard, ''.join(json.dumps(row) + '\n' for row in rows))
            done = min(first + SHARD_SIZE, len(source))
            logging.info('targets: %d of %d prompts', done, len(source))
        _write_atomically(complete, ''.join(shard.read_text('utf-8') for shard in shards))
        for shard in shards:
            shard.unlink()
    if complete.stat().st_size == 0:
        raise ValueError(
            f'no answer of the teacher ended within max_new_tokens={config.max_new_tokens}; '
            f'raise it and remove {directory}.'
        )
    return DataSpec(kind='jsonl', path=str(complete))


def _answer(
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    source: Any,
    indices: range,
    config: TargetsConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows of one shard; answers that did not end are left out."""
    rows, left_out = [], 0
    for first in range(indices.start, indices.stop, config.batch_size):
        chunk = range(first, min(first + config.batch_size, indices.stop))
        examples = [source[i] for i in chunk]
        filled = examples + [examples[-1]] * (config.batch_size - len(examples))  # one shape
        prompts = [tokenizer.format_prompt(example['prompt']) for example in filled]
        tokens, lengths = pad_prompts(prompts, tokenizer.pad_id, multiple=config.prompt_multiple)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            jax.random.key(seed), first + np.arange(config.batch_size)
        )
        output = jax.device_get(sampler(params, tokens, lengths, rng=keys))
        for example, text, row, length in zip(
            examples, decode_responses(tokenizer, output), output.tokens, output.lengths,
            strict=False,
        ):  # fmt: skip
            if row[length - 1] in tokenizer.stop_ids:
                rows.append(dict(example) | {'response': text})
            else:
                left_out += 1
    if left_out:
        logging.warning(
            'targets: left out %d answers longer than max_new_tokens=%d',
            left_out, config.max_new_tokens,
        )  # fmt: skip
    return rows


def _fingerprint(
    params: Any, tokenizer: Tokenizer, config: TargetsConfig, seed: int
) -> dict[str, Any]:
    """What the targets depend on, in JSON types."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep='/').items()):
        digest.update(name.encode())
        digest.update(np.asarray(value).tobytes())
    made_from = {
        'teacher': digest.hexdigest(),
        'tokenizer': tokenizer.content_hash,
        'config': dataclasses.asdict(config),
        'seed': seed,
    }
    return json.loads(json.dumps(made_from))


def _check_made_alike(path: Path, made_from: dict[str, Any]) -> None:
    if not path.exists():
        _write_atomically(path, json.dumps(made_from, indent=2) + '\n')
        return
    before = json.loads(path.read_text('utf-8'))
    differing = sorted(key for key in made_from if before.get(key) != made_from[key])
    if differing:
        raise ValueError(
            f'{path.parent} holds targets made with another {" and ".join(differing)}; '
            'use another workdir, or remove that directory.'
        )


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + '.partial')
    partial.write_text(text, encoding='utf-8')
    partial.replace(path)
