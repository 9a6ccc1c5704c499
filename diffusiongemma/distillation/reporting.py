"""Reports progress in the terminal, and metrics to TensorBoard and metrics.jsonl."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffusiongemma.parallel import processes

METRICS_FILE = 'metrics.jsonl'


class Reporter:
    """A reporter that shows the progress of a training run and writes its metrics.

    It shows a progress bar (loss, tokens/s, ETA) if stdout is a terminal, and otherwise logs one
    line per report. Scalars are written to TensorBoard event files in `workdir`/tensorboard, and
    as one JSON row per report to `workdir`/metrics.jsonl. Only process 0 reports.
    """

    def __init__(self, workdir: Path, description: str, first_step: int, num_steps: int) -> None:
        self._writes = processes.is_writer()
        if self._writes:
            from tensorboardX import SummaryWriter  # slow, because it imports torch if installed

            self._writer = SummaryWriter(str(workdir / 'tensorboard'))
            self._metrics_file = open(workdir / METRICS_FILE, 'a', encoding='utf-8')
        self._num_steps = num_steps
        self._last_step, self._last_time = first_step, time.perf_counter()
        self._progress = _progress_bar()
        self._task = self._progress.add_task(
            description, total=num_steps, completed=first_step, status=''
        )
        self._description = description

    def __enter__(self) -> 'Reporter':
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()
        if self._writes:
            self._writer.close()
            self._metrics_file.close()

    def report(
        self, step: int, metrics: Mapping[str, float], throughput: Mapping[str, float]
    ) -> None:
        """Shows and writes the metrics after `step` steps, and the throughput."""
        if not self._writes:
            return
        now = time.perf_counter()
        elapsed, steps = now - self._last_time, step - self._last_step
        self._last_step, self._last_time = step, now
        scalars = {**metrics, **throughput}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._metrics_file.write(json.dumps({'step': step, **scalars}) + '\n')
        self._metrics_file.flush()
        status = f'loss {metrics["loss"]:.4f}  {throughput["tokens_per_second"]:,.0f} tok/s'
        self._progress.update(self._task, completed=step, status=status)
        if self._progress.disable:
            remaining = (self._num_steps - step) * elapsed / max(steps, 1)
            others = '  '.join(f'{k} {v:.4f}' for k, v in metrics.items() if k != 'loss')
            logging.info(
                '%s %d/%d  %s  %s  ETA %s',
                self._description, step, self._num_steps, status, others, _clock(remaining),
            )  # fmt: skip


class AnswerProgress:
    """A progress display for the teacher's answers: a bar, or log lines without a terminal."""

    LOG_SECONDS = 30.0

    def __init__(self, answered: int, total: int) -> None:
        """Starts with `answered` of `total` prompts, which earlier calls have answered."""
        self._answered, self._total = answered, total
        self._prompts = self._tokens = 0  # answered in this call
        self._start = self._last_log = time.perf_counter()
        self._progress = _progress_bar()
        self._task = self._progress.add_task('targets', total=total, completed=answered, status='')

    def __enter__(self) -> 'AnswerProgress':
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def add(self, prompts: int, tokens: int) -> None:
        """Adds a number of answered prompts and the total number of their tokens."""
        self._answered += prompts
        self._prompts += prompts
        self._tokens += tokens
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        status = f'{self._tokens / elapsed:,.0f} tok/s'
        self._progress.update(self._task, completed=self._answered, status=status)
        left = self._total - self._answered
        if self._progress.disable and (now - self._last_log > self.LOG_SECONDS or not left):
            self._last_log = now
            logging.info(
                'targets %d/%d  %s  ETA %s',
                self._answered, self._total, status, _clock(left * elapsed / self._prompts),
            )  # fmt: skip


def progress(parts: Sequence[Any], description: str) -> Iterator[Any]:
    """Iterates over the parts of a task with a progress bar, or a log line at its end."""
    bar, start = _progress_bar(), time.perf_counter()
    task = bar.add_task(description, total=len(parts), status='')
    with bar:
        for part in parts:
            yield part
            bar.advance(task)
    if bar.disable and processes.is_writer():
        logging.info('%s: %.0f s', description, time.perf_counter() - start)


def _progress_bar() -> Progress:
    """Returns a progress bar, which is disabled if stdout is not a terminal."""
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[status]}'),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stdout),
        disable=not (sys.stdout.isatty() and processes.is_writer()),
    )


def _clock(seconds: float) -> str:
    """Returns hours, minutes and seconds, such as '26:03:59'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60:02}:{minutes % 60:02}:{seconds:02}'


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the rows of `workdir`/metrics.jsonl by step; a resumed run replaces older rows."""
    lines = (workdir / METRICS_FILE).read_text(encoding='utf-8').splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for _, row in sorted({row['step']: row for row in rows}.items())]
