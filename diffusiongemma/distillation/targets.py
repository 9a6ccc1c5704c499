"""Stage 0 of Diffuse-Distill: the teacher generates the responses for training the student.

This is sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947): greedy teacher outputs
are more predictable than the data, which helps a parallel decoder.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from diffusiongemma.data.sources import DataSpec, Source, load_source
from diffusiongemma.data.target_files import TargetFiles
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.answers import Answerer, TargetsConfig
from diffusiongemma.distillation.reporting import AnswerProgress
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import processes

SHARD_SIZE = 1024  # prompts per file
MADE_FROM_FILE = 'made_from.json'
COUNTS_FILE = 'counts.json'  # written last


def write_targets(
    model: Gemma,
    params: Any,
    tokenizer: Tokenizer,
    config: TargetsConfig,
    directory: Path,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
) -> DataSpec:
    """Writes the teacher's answers as a TFDS dataset and returns its spec.

    Shards of `SHARD_SIZE` prompts are written atomically and complete ones are kept, so a second
    call finishes an interrupted one. A prompt that occurs several times in the source is answered
    once.

    Args:
      model: the teacher.
      params: the parameters of the teacher.
      tokenizer: the tokenizer of the teacher.
      config: the settings of the targets.
      directory: the directory of the dataset, of made_from.json and finally counts.json.
      mesh: the mesh for the sharded parameters and the rows of a batch.
      seed: the seed of draws at a temperature above 0. An answer only depends on the seed and the
        index of its prompt.

    Returns:
      The spec of the dataset. If the settings ask for neither answers nor distributions, nothing is
      written and it is `config.source`.

    Raises:
      ValueError: if the directory contains targets with other settings, the settings do not fit
        the teacher, the mesh does not divide the batch, or no answer ended within max_new_tokens.
    """
    if not config.sequence_level and not config.top_k_logits:
        return config.source  # the source itself has the targets
    check_targets(config, model)
    source = load_source(config.source)
    made_from = _made_from(params, tokenizer, source, config, seed)
    processes.check_shared(directory)
    _check_same_settings(directory / MADE_FROM_FILE, made_from)
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    name = f'targets_{digest[:16]}'  # the name identifies the data of a training run
    counts_file = directory / COUNTS_FILE
    if not processes.broadcast_from_writer(counts_file.exists()):
        indices = _distinct(source) if config.sequence_level else list(range(len(source)))
        shards = [
            indices[first : first + SHARD_SIZE] for first in range(0, len(indices), SHARD_SIZE)
        ]
        files = TargetFiles(
            directory,
            name,
            len(shards),
            config.top_k_logits,
            response_ids=config.keep_unfinished,
        )
        missing = [number for number in range(len(shards)) if not files.has(number)]
        missing = processes.broadcast_from_writer(missing)  # other processes may see new files late
        if missing:
            answer = Answerer(model, params, tokenizer, config, mesh, seed)
            _write_shards(files, shards, missing, source, answer, config.batch_size)
        answers = processes.broadcast_from_writer(files.finish() if processes.is_writer() else None)
        if not answers:
            raise ValueError(
                f'no answer of the teacher ended within max_new_tokens={config.max_new_tokens}; '
                f'raise it and remove {directory}.'
            )
        counts = {
            'prompts': len(source),
            'duplicates': len(source) - len(indices),
            'answers': answers,
            'left_out': len(indices) - answers,  # answers that are too long or only thoughts
        }
        logging.info('targets: %s', ', '.join(f'{n} {key}' for key, n in counts.items()))
        _write_atomically(counts_file, json.dumps(counts) + '\n')
        processes.broadcast_from_writer(None)  # waits until process 0 has written the file
    return DataSpec(kind='tfds', name=name, path=str(directory))


def check_targets(config: TargetsConfig, model: Gemma) -> None:
    """Raises ValueError if a setting exceeds the vocabulary or the positions of the teacher."""
    if config.top_k_logits > model.config.vocab_size:
        raise ValueError(
            f'config.targets.top_k_logits={config.top_k_logits} is more than the '
            f'{model.config.vocab_size} tokens of the teacher; use fewer.'
        )
    positions = model.config.max_positions
    if config.sequence_level and positions is not None and config.max_new_tokens >= positions:
        raise ValueError(
            f'config.targets.max_new_tokens={config.max_new_tokens} leaves no room for a prompt in '
            f'the {positions} positions of the teacher; lower it.'
        )


def _distinct(source: Source) -> list[int]:
    """Returns the indices of distinct prompts, each at its first occurrence."""
    first: dict[bytes, int] = {}
    for index in range(len(source)):
        prompt = hashlib.sha256(source[index]['prompt'].encode()).digest()
        first.setdefault(prompt, index)
    return list(first.values())


def _write_shards(
    files: TargetFiles,
    shards: Sequence[Sequence[int]],
    missing: Sequence[int],
    source: Source,
    answer: Answerer,
    batch_size: int,
) -> None:
    """Writes the missing shards; each is a list of indices in the source."""
    total, to_do = sum(map(len, shards)), sum(len(shards[number]) for number in missing)
    with AnswerProgress(total - to_do, total) as progress:
        for number in missing:
            rows, indices = [], shards[number]
            for first in range(0, len(indices), batch_size):
                batch = indices[first : first + batch_size]
                answers, num_tokens = answer(batch, [source[index] for index in batch])
                rows += answers
                progress.add(len(batch), num_tokens)
            if len(rows) < len(indices):
                logging.warning(
                    'targets: left out %d of %d prompts, whose answers are only thoughts or longer '
                    'than max_new_tokens or the positions of the teacher',
                    len(indices) - len(rows), len(indices),
                )  # fmt: skip
            if processes.is_writer():
                files.write(number, rows)


def _made_from(
    params: Any, tokenizer: Tokenizer, source: Source, config: TargetsConfig, seed: int
) -> dict[str, Any]:
    """Returns all settings that the targets depend on, as JSON values."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep='/').items()):
        digest.update(name.encode())
        digest.update(np.asarray(processes.on_host(value)).tobytes())
    spec = config.source
    identity = getattr(source, 'fingerprint', spec.describe())
    # Only set if there is a choice of formats, so that older targets keep their name.
    has_format = tokenizer.format_hash is not None
    made_from: dict[str, Any] = {'prompt_format': tokenizer.format_hash} if has_format else {}
    if config.keep_unfinished:  # only if set, for the same reason
        made_from['keep_unfinished'] = True
    return made_from | {
        'teacher': digest.hexdigest(),
        'tokenizer': tokenizer.content_hash,
        'prompts': [identity, len(source), spec.prompt_feature, spec.response_feature],
        'max_new_tokens': config.max_new_tokens,
        'temperature': config.temperature,
        'sequence_level': config.sequence_level,
        'top_k_logits': config.top_k_logits,
        'seed': seed,
    }


def _check_same_settings(path: Path, made_from: dict[str, Any]) -> None:
    """Raises ValueError if the targets beside `path` have other settings; writes it if missing."""
    previous = processes.broadcast_from_writer(
        json.loads(path.read_text()) if path.exists() else None
    )
    if previous is None:
        _write_atomically(path, json.dumps(made_from, indent=2) + '\n')
        return
    keys = {*made_from, *previous}
    differing = sorted(key for key in keys if previous.get(key) != made_from.get(key))
    if differing:
        raise ValueError(
            f'{path.parent} holds targets made with another {" and ".join(differing)}; '
            'use another workdir, or remove that directory.'
        )


def _write_atomically(path: Path, text: str) -> None:
    if not processes.is_writer():
        return
    partial = path.with_name(path.name + '.partial')
    partial.write_text(text, encoding='utf-8')
    partial.replace(path)
