"""The resumable stream of training batches: shuffled, mixed, tokenized and packed.

    sources (shuffled each epoch, this process's shard, repeated forever)
      -> mixed by weight -> tokenized -> packed -> batched

The stream depends only on its arguments. Its state is a small dict that JSON can store; a stream
with the same arguments that is set to this state continues with the next batch.

Each of w worker processes reads every w-th example of each source and makes every w-th batch.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import grain
import jax
import numpy as np
from absl import flags

from diffusiongemma.data import packing
from diffusiongemma.data.sources import MAX_SEED, DataSpec, Source, load_source
from diffusiongemma.errors import check_range

_STATE_VERSION = 1
# After this many consecutive documents that do not fit, the layout is wrong for the data. An error
# is better than a stream that searches for a fitting document for hours.
_MAX_CONSECUTIVE_DROPS = 10_000

SourceLike = DataSpec | Source


class _Tokenize:
    """A map from an example to the features of its document; None (skipped) if it fits no row."""

    def __init__(
        self, name: str, size: int, tokenizer: packing.PromptTokenizer, layout: packing.RowLayout
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._layout = layout
        self._dropped = packing.DropCounter(name)
        self._consecutive = 0
        # The last document of one epoch and the first of the next are up to 2 * size apart.
        self._limit = min(2 * size, _MAX_CONSECUTIVE_DROPS)

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator
    ) -> packing.Features | None:
        document = packing.tokenize(example, self._tokenizer)
        reason = packing.misfit(document, self._layout)
        if reason is None:
            self._consecutive = 0
            offset = packing.draw_offset(document, self._layout, rng)
            canvas = packing.draw_canvas(document, self._layout, offset, rng)
            return packing.document_features(document, self._layout, offset, canvas)
        self._dropped.add(reason)
        self._consecutive += 1
        if self._consecutive >= self._limit:
            raise ValueError(
                f'{self._name}: {self._consecutive} documents in succession fit no row '
                f'({dict(self._dropped.counts)}; the last has {len(document.tokens)} tokens). '
                'Raise row_length or canvases_per_row, or shorten the data.'
            )
        return None


class TrainIterator(grain.DatasetIterator):  # type: ignore[misc]  # grain has no annotations
    """An endless iterator over batches; `packing` documents their keys.

    It is a grain iterator: `get_state` and `set_state` work with a dict that JSON can store, and
    `grain.checkpoint.CheckpointSave(it)` / `CheckpointRestore(it)` work with orbax.
    """

    def __init__(self, batches: grain.DatasetIterator, fingerprint: dict[str, Any]) -> None:
        """Wraps grain's iterator; `fingerprint` describes the settings that a state depends on."""
        super().__init__(batches)
        self._batches = batches
        self._fingerprint = fingerprint

    def __next__(self) -> packing.Features:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last returned batch, as a dict that JSON can store."""
        return {
            'version': _STATE_VERSION,
            'fingerprint': self._fingerprint,
            'grain': self._batches.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from the position of `state`.

        Raises:
          ValueError: if the state comes from a stream with other settings or other data.
        """
        if not isinstance(state, dict) or state.get('version') != _STATE_VERSION:
            raise ValueError(f'Not a data state of version {_STATE_VERSION}: {str(state)[:200]!r}.')
        saved = state['fingerprint']
        names = sorted(set(saved) | set(self._fingerprint))
        differing = [
            f'{name}: saved {saved.get(name)!r}, now {self._fingerprint.get(name)!r}'
            for name in names
            if saved.get(name) != self._fingerprint.get(name)
        ]
        if differing:
            raise ValueError(
                'The saved run has other data settings, so its saved data state belongs to '
                f'another data stream ({"; ".join(differing)}). Resume with the same settings, or '
                'start a new run in another workdir.'
            )
        self._batches.set_state(copy.deepcopy(state['grain']))  # grain modifies its state in place

    def close(self) -> None:
        """Stops the threads and processes that make batches; the iterator cannot be used after."""
        if hasattr(super(), 'close'):  # older versions of grain stop them with the iterator itself
            super().close()


def _as_list(sources: SourceLike | Sequence[SourceLike]) -> list[SourceLike]:
    """Returns one or several specs or sources as a list. A list of examples is one source."""
    if not isinstance(sources, (list, tuple)) or (sources and isinstance(sources[0], Mapping)):
        return [cast(SourceLike, sources)]
    if not sources:
        raise ValueError('There is no data: pass at least one DataSpec or source.')
    return list(sources)


def _source_seed(seed: int, index: int) -> int:
    """Returns an independent seed for one source of a mixture."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def _weights(listed: Sequence[SourceLike], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        weights = [item.weight if isinstance(item, DataSpec) else 1.0 for item in listed]
    if len(weights) != len(listed):
        raise ValueError(f'{len(listed)} sources need as many weights, got {list(weights)}.')
    if not all(weight > 0 for weight in weights):
        raise ValueError(f'Weights of sources must be > 0, got {list(weights)}.')
    return [float(weight) for weight in weights]


def _start_worker(worker: int, workers: int) -> None:
    """Initializes a worker process: only its parent uses accelerators and handles signals."""
    del worker, workers
    # Importing the package does not start a JAX backend. A source that uses JAX runs on the CPU.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')
    # Ctrl-C and SIGTERM reach all processes, but the parent needs batches until it has stopped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker process when its parent process has ended for any reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _out_of_shared_memory(batch: packing.Features) -> packing.Features:
    """Returns a copy of a batch in ordinary memory, which frees its shared memory."""
    return {name: np.array(value) for name, value in batch.items()}


def _stream(
    item: SourceLike,
    tokenizer: Any,
    layout: packing.RowLayout,
    seed: int,
    process_index: int,
    process_count: int,
) -> tuple[grain.MapDataset, dict[str, Any]]:
    """Returns the endless stream of one source's tokenized documents, and its fingerprint."""
    source = load_source(item) if isinstance(item, DataSpec) else item
    name = item.describe() if isinstance(item, DataSpec) else type(item).__name__
    shard = _shard(source, name, seed, process_index, process_count)
    tokenize = _Tokenize(name, len(shard), tokenizer, layout)
    about = {'name': getattr(source, 'fingerprint', name), 'size': len(source)}
    return shard.repeat().random_map(tokenize, seed=seed), about


def make_train_iterator(
    sources: SourceLike | Sequence[SourceLike],
    tokenizer: Any,
    *,
    batch_size: int,
    row_length: int,
    canvases_per_row: int,
    canvas_length: int,
    seed: int,
    random_offset_rate: float = 0.0,
    top_k: int = 0,
    one_canvas: bool = False,
    weights: Sequence[float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    packing_bins: int = 64,
    prefetch: int = 2,
    workers: int = 0,
) -> TrainIterator:
    """Returns the endless stream of training batches of one process.

    Args:
      sources: a DataSpec, a source (random access, examples are {'prompt', 'response', ...}), or
        a list of them to mix.
      tokenizer: a `Tokenizer`.
      batch_size: the number of rows per batch of this process.
      row_length: the number of tokens per row; longer documents are dropped with a warning.
      canvases_per_row: the number of canvas slots per row; 0 leaves the canvas keys out.
      canvas_length: the number of tokens per canvas.
      seed: the seed of the shuffles and the random offsets, in [0, MAX_SEED].
      random_offset_rate, top_k, one_canvas: see `packing.RowLayout`.
      weights: the relative share of each source, in documents; by default the weight of each spec,
        and 1 for a source without a spec.
      process_index: the shard to read; the shards of an epoch are disjoint.
      process_count: the number of shards.
      packing_bins: the number of rows that are open for packing at a time.
      prefetch: the number of batches that a thread, or each worker process (at least 1), makes
        ahead of time; 0 makes each on request.
      workers: the number of processes that make batches, for training steps that are faster than
        one thread; 0 for none. It affects the order of the data. Sources and tokenizer are
        pickled, and each worker imports the main script, which therefore needs the guard
        `if __name__ == '__main__'`.

    Returns:
      An iterator over dicts of numpy arrays, see `packing`; `close` stops its workers.

    Raises:
      ValueError: if sizes, weights or shards are invalid.
    """
    _check_sizes(batch_size, process_index, process_count, seed, workers)
    shape = (row_length, canvases_per_row, canvas_length, tokenizer.pad_id)
    layout = packing.RowLayout(*shape, random_offset_rate, top_k, one_canvas)
    listed = _as_list(sources)
    shares = _weights(listed, weights)
    parts, described = [], []
    for index, (item, share) in enumerate(zip(listed, shares, strict=True)):
        source_seed = _source_seed(seed, index)
        part, about = _stream(item, tokenizer, layout, source_seed, process_index, process_count)
        parts.append(part)
        described.append(about | {'weight': share})
    features = _mixed(parts, shares, workers).to_iter_dataset(grain.ReadOptions(num_threads=0))
    rows = packing.pack_rows(
        features, layout, bins=packing_bins, seed=_source_seed(seed, len(parts))
    )
    batches = _prefetched(rows.batch(batch_size, drop_remainder=True), prefetch, workers)
    fingerprint = {
        'sources': described,
        'tokenizer': _tokenizer_hash(tokenizer),
        'batch_size': batch_size,
        'row_length': row_length,
        'canvases_per_row': canvases_per_row,
        'canvas_length': canvas_length,
        'random_offset_rate': random_offset_rate,
        'one_canvas': one_canvas,
        'seed': seed,
        'process': [process_index, process_count],
        'packing_bins': packing_bins,
    }
    if workers:  # saved states from before this key are from streams without workers
        fingerprint['workers'] = workers
    return TrainIterator(iter(batches), fingerprint)


def _check_sizes(
    batch_size: int, process_index: int, process_count: int, seed: int, workers: int
) -> None:
    check_range('batch_size', batch_size, 1)
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index must be in [0, {process_count}), got {process_index}.')
    check_range('seed', seed, 0, MAX_SEED)
    check_range('workers', workers, 0)


def _shard(
    source: Source, name: str, seed: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """Returns the shuffled examples of one process, which are disjoint between processes."""
    if len(source) < process_count:
        raise ValueError(
            f'{name} has {len(source)} examples, fewer than process_count={process_count}, '
            'so some process would have none.'
        )
    return grain.MapDataset.source(source).shuffle(seed=seed)[process_index::process_count]


def _prefetched(batches: grain.IterDataset, prefetch: int, workers: int) -> grain.IterDataset:
    """Returns a stream whose batches are made ahead of time by worker processes or a thread."""
    if workers:
        if not flags.FLAGS.is_parsed():  # for example in a notebook; grain reads its own flags
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(prefetch, 1)),
            _start_worker,
        ).map(_out_of_shared_memory)
    if not prefetch:
        return batches
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)


def _mixed(
    parts: Sequence[grain.MapDataset], shares: Sequence[float], workers: int
) -> grain.MapDataset:
    """Returns a mixture of endless streams, such that each worker reads the same mixture."""
    if len(parts) == 1:
        return parts[0]
    if workers < 2:
        return grain.MapDataset.mix(parts, shares)
    # grain gives worker i of w the elements i, i + w, ...: of one mixture 'abab', 'aa' and 'bb'.
    each = [
        grain.MapDataset.mix([part[worker::workers] for part in parts], shares)
        for worker in range(workers)
    ]
    return grain.MapDataset.mix(each)


def _tokenizer_hash(tokenizer: Any) -> str:
    name = getattr(tokenizer, 'content_hash', type(tokenizer).__name__)
    prompt_format = getattr(tokenizer, 'format_hash', None)
    return name if prompt_format is None else f'{name} {prompt_format}'


def eval_examples(source: SourceLike, n: int | None = None) -> list[dict[str, Any]]:
    """Returns the first n examples of a spec or source in order, or all if there are fewer.

    Raises:
      ValueError: if n is below 1.
    """
    if n is not None and n < 1:
        raise ValueError(f'n must be >= 1 or None for all, got {n}.')
    examples = load_source(source) if isinstance(source, DataSpec) else source
    count = len(examples) if n is None else min(n, len(examples))
    return [examples[i] for i in range(count)]
