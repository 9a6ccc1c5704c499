"""Counters of a server's requests, tokens and passes, in the text format of Prometheus."""

import collections
import threading
import time
from collections.abc import Iterable, Mapping

from diffusiongemma.sampling.engine import Result

_WINDOW_SECONDS = 10.0
_PREFIX = 'diffusiongemma_'
_HELP = {
    'requests_total': 'HTTP requests by endpoint and status.',
    'answers_total': 'Answers by decode mode and finish reason.',
    'prompt_tokens_total': 'Tokens of the prompts of answered requests.',
    'tokens_total': 'Tokens of answers by decode mode, including the stop token.',
    'denoise_passes_total': 'Denoise passes by decode mode.',
    'causal_passes_total': 'Causal passes by decode mode: commits, verifications, single tokens.',
}

_Labels = tuple[tuple[str, str], ...]  # (name, value) pairs


class Metrics:
    """A thread-safe collection of counters, a histogram of accepted lengths and a token rate."""

    def __init__(self) -> None:
        """Sets all counters to zero."""
        self._lock = threading.Lock()
        self._counts: dict[str, collections.Counter[_Labels]] = {
            name: collections.Counter() for name in _HELP
        }
        self._accepted: collections.Counter[int] = collections.Counter()
        self._recent: collections.deque[tuple[float, int]] = collections.deque()

    def request(self, endpoint: str, status: int) -> None:
        """Counts an HTTP response by endpoint and status."""
        with self._lock:
            self._counts['requests_total'][('endpoint', endpoint), ('status', str(status))] += 1

    def answer(self, prompt_tokens: int, result: Result) -> None:
        """Counts an answer, its tokens and its passes."""
        mode = (('mode', result.mode),)
        with self._lock:
            self._counts['answers_total'][(*mode, ('reason', result.reason))] += 1
            self._counts['prompt_tokens_total'][()] += prompt_tokens
            self._counts['tokens_total'][mode] += len(result.tokens)
            self._counts['denoise_passes_total'][mode] += result.denoise_passes
            self._counts['causal_passes_total'][mode] += result.encode_passes
            if result.accepted_lengths is not None:
                for length, count in enumerate(result.accepted_lengths.tolist()):
                    self._accepted[length] += count

    def tokens(self, count: int) -> None:
        """Counts tokens that were just generated, for the rate."""
        with self._lock:
            self._recent.append((time.monotonic(), count))
            self._forget()

    def rate(self) -> float:
        """Returns the tokens per second over the last ten seconds."""
        with self._lock:
            self._forget()
            return sum(count for _, count in self._recent) / _WINDOW_SECONDS

    def _forget(self) -> None:
        """Drops token counts that are older than the window of the rate."""
        start = time.monotonic() - _WINDOW_SECONDS
        while self._recent and self._recent[0][0] < start:
            self._recent.popleft()

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Returns all metrics in the text format of Prometheus.

        Args:
          gauges: additional values by metric name, each with its help text.
        """
        gauges = dict(gauges)
        gauges['tokens_per_second'] = (
            'Tokens of answers per second, over the last ten seconds.', self.rate(),
        )  # fmt: skip
        lines: list[str] = []
        with self._lock:
            for name, counts in self._counts.items():
                lines += _family(name, 'counter', _HELP[name])
                samples = sorted(counts.items()) or (
                    [((), 0)] if name == 'prompt_tokens_total' else []
                )
                lines += [_sample(name, labels, value) for labels, value in samples]
            lines += self._histogram()
        for name, (about, value) in gauges.items():
            lines += [*_family(name, 'gauge', about), _sample(name, (), value)]
        return '\n'.join(lines) + '\n'

    def _histogram(self) -> list[str]:
        name = 'accepted_length'
        lines = _family(name, 'histogram', 'Tokens that a verification emitted (lossless mode).')
        total = 0
        for length in range(max(self._accepted, default=0) + 1):
            total += self._accepted[length]
            lines.append(_sample(f'{name}_bucket', (('le', str(length)),), total))
        lines.append(_sample(f'{name}_bucket', (('le', '+Inf'),), total))
        weighted = sum(length * count for length, count in self._accepted.items())
        return [*lines, _sample(f'{name}_sum', (), weighted), _sample(f'{name}_count', (), total)]


def _family(name: str, kind: str, about: str) -> list[str]:
    return [f'# HELP {_PREFIX}{name} {about}', f'# TYPE {_PREFIX}{name} {kind}']


def _sample(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    """Returns one line; label values are names in this package, which need no escaping."""
    inside = ','.join(f'{key}="{text}"' for key, text in labels)
    return f'{_PREFIX}{name}{{{inside}}} {value}' if inside else f'{_PREFIX}{name} {value}'
