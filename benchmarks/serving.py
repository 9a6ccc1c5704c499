"""Tests a server under load: compares its answers with those of single requests, and times them.

    python benchmarks/serving.py --checkpoint=builtin --clients=32 --requests=20

It starts `python -m diffusiongemma.serve` and sends a set of requests one at a time. Then many
clients send them concurrently, while other clients send malformed bodies or disconnect early. Every
answer is compared with that of the single request. At the end, SIGTERM is sent while requests are
open, each of which must be answered or rejected. It prints the latencies of the compared answers,
the resident memory of the server at the beginning, in the middle and at the end, and the load of
the machine; the exit status is 1 if any check fails.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from diffusiongemma import cli
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'builtin', 'A diffusion student of word problems.')
_CLIENTS = flags.DEFINE_integer('clients', 32, 'Number of concurrent clients.', lower_bound=1)
_REQUESTS = flags.DEFINE_integer('requests', 20, 'Requests of each client.', lower_bound=1)
_MALFORMED = flags.DEFINE_integer('malformed', 200, 'Number of invalid bodies.', lower_bound=0)
_LEAVING = flags.DEFINE_integer(
    'leaving', 20, 'Number of clients that disconnect early.', lower_bound=0
)
_PROBLEMS = flags.DEFINE_integer(
    'problems', 10, 'Number of word problems, each with 5 settings.', lower_bound=1
)

CHAT, COMPLETIONS = '/v1/chat/completions', '/v1/completions'
SETTINGS = (
    {'mode': 'lossless', 'temperature': 0},
    {'mode': 'lossless', 'temperature': 1.0},
    {'mode': 'diffusion', 'temperature': 0},
    {'mode': 'autoregressive', 'temperature': 0, 'max_tokens': 24},
    {'mode': 'lossless', 'temperature': 0, 'stop': [' is']},
)
INVALID_BODIES = (  # bodies and the expected status
    ('{', 400), ('[]', 400), ('\ufffd', 400), ('{"messages": []}', 400), ('{"messages": 3}', 400),
    ('{"messages": [{"role": "cat", "content": "x"}]}', 400),
    ('{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400),
    ('{"messages": [{"role": "user", "content": "x"}], "seed": 1.5}', 400),
    ('{"messages": [{"role": "user", "content": "x"}], "surprise": 1}', 400),
    ('{"messages": [{"role": "user", "content": "x"}], "n": 2}', 400),
    ('{"messages": [{"role": "user", "content": "x"}], "stop": [""]}', 400),
    ('{"messages": [{"role": "user", "content": "x"}], "model": "another"}', 404),
    ('[' * 5000, 400), (json.dumps({'messages': [{'role': 'user', 'content': 'a ' * 9000}]}), 400),
    ('"' + 'x' * 1_100_000 + '"', 413),
)  # fmt: skip


def start() -> tuple[subprocess.Popen, str]:
    """Starts a server and returns its process and its address."""
    command = [sys.executable, '-m', 'diffusiongemma.serve', f'--checkpoint={_CHECKPOINT.value}']
    process = subprocess.Popen([*command, '--port=0'], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ''
    if 'http://' not in line:
        raise ValueError(f'The server did not start: {line!r}.')
    return process, line.split()[-1]


def resident_mb(process: subprocess.Popen) -> float:
    """Returns the resident memory of a process in MB of 1,024 kB."""
    status = Path(f'/proc/{process.pid}/status').read_text()
    kilobytes = re.search(r'VmRSS:\s+(\d+) kB', status)
    assert kilobytes is not None
    return int(kilobytes.group(1)) / 1024


def requests_to_compare() -> list[dict]:
    """Returns request bodies with seeds, which determine the answers."""
    problems = eval_examples(DataSpec(kind='wordmath', split='test', size=_PROBLEMS.value))
    return [
        {'messages': [{'role': 'user', 'content': problem['prompt']}], 'seed': seed} | settings
        for seed, problem in enumerate(problems)
        for settings in SETTINGS
    ]


def ask(client: httpx.Client, body: dict) -> dict:
    """Returns the answer to a request without its id and time."""
    response = client.post(CHAT, json=body)
    if response.status_code != 200:
        raise AssertionError(f'{response.status_code}: {response.text[:200]}')
    return {k: v for k, v in response.json().items() if k not in ('id', 'created')}


class Load:
    """The clients that use the server concurrently, and their results.

    Attributes:
      seconds: the latencies of the compared answers.
      problems: descriptions of failed checks.
      counts: the numbers of malformed bodies and early disconnects.
    """

    def __init__(self, url: str, bodies: list[dict], alone: list[dict]):
        self._url, self._bodies, self._alone = url, bodies, alone
        self.seconds: list[float] = []
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _note(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)

    def compare(self, number: int) -> None:
        """Runs one client that sends requests in sequence and compares their answers."""
        order = random.Random(number)
        with httpx.Client(base_url=self._url, timeout=3600) as client:
            for _ in range(_REQUESTS.value):
                place = order.randrange(len(self._bodies))
                start_time = time.perf_counter()
                try:
                    answer = ask(client, self._bodies[place])
                except (AssertionError, httpx.HTTPError) as error:
                    self._note(f'request {place}: {error!r}')
                    continue
                with self._lock:
                    self.seconds.append(time.perf_counter() - start_time)
                if answer != self._alone[place]:
                    self._note(f'request {place} got another answer than the single request')

    def malform(self) -> None:
        """Runs one client that sends invalid bodies and checks the errors."""
        headers = {'content-type': 'application/json'}
        with httpx.Client(base_url=self._url, timeout=3600) as client:
            for number in range(_MALFORMED.value):
                content, status = INVALID_BODIES[number % len(INVALID_BODIES)]
                try:
                    response = client.post(CHAT, content=content.encode(), headers=headers)
                    message = response.json()['error']['message']
                    fine = response.status_code == status and len(message.splitlines()) == 1
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    fine, response = False, error
                if not fine:
                    self._note(f'{content[:40]!r} was answered by {response!r}')
                self.counts['malformed bodies'] += 1

    def leave(self) -> None:
        """Disconnects in the middle of a body, before the answer, and in a stream."""
        host, port = self._url.removeprefix('http://').split(':')
        for number in range(_LEAVING.value):
            body = json.dumps(self._bodies[number % len(self._bodies)] | {'stream': True})
            head = f'POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
            text = f'{head}Content-Length: {len(body)}\r\n\r\n{body}'
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(text[: len(text) // 2 if number % 3 == 0 else None].encode())
                if number % 3 == 1:
                    connection.recv(64)
            self.counts['connections that were cut'] += 1
            time.sleep(0.05)

    def run(self) -> None:
        """Runs all clients concurrently."""
        with ThreadPoolExecutor(_CLIENTS.value + 2) as pool:
            work = [pool.submit(self.malform), pool.submit(self.leave)]
            work += [pool.submit(self.compare, number) for number in range(_CLIENTS.value)]
            for future in work:
                future.result()


def terminate(process: subprocess.Popen, url: str, bodies: list[dict]) -> Counter:
    """Sends SIGTERM while requests are open, and counts their outcomes."""
    outcomes: Counter[str] = Counter()
    lock, requests_sent = threading.Lock(), threading.Semaphore(0)

    def client(number: int) -> None:
        while True:
            requests_sent.release()
            try:
                response = httpx.post(url + CHAT, json=bodies[number % len(bodies)], timeout=3600)
            except httpx.ConnectError:
                return
            except httpx.HTTPError as error:
                with lock:
                    outcomes[f'cut off ({type(error).__name__})'] += 1
                return
            with lock:
                outcomes[str(response.status_code)] += 1
            if response.status_code != 200:
                return

    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(client, number) for number in range(8)]
        for _ in range(16):
            requests_sent.acquire()
        process.send_signal(signal.SIGTERM)
        for future in work:
            future.result()
    outcomes[f'exit status {process.wait(120)}'] += 1
    return outcomes


def main(argv: list[str]) -> None:
    del argv
    console = Console(width=100)
    process, url = start()
    try:
        bodies = requests_to_compare()
        with httpx.Client(base_url=url, timeout=3600) as client:
            alone = [ask(client, body) for body in bodies]
        memory, load = [resident_mb(process)], Load(url, bodies, alone)
        start_time, middle = time.perf_counter(), threading.Event()

        def watch() -> None:
            half = _CLIENTS.value * _REQUESTS.value / 2
            while len(load.seconds) < half and not middle.wait(0.2):
                pass
            memory.append(resident_mb(process))

        watcher = threading.Thread(target=watch)
        watcher.start()
        load.run()
        seconds = time.perf_counter() - start_time
        middle.set()
        watcher.join()
        memory.append(resident_mb(process))
        outcomes = terminate(process, url, bodies)
    finally:
        process.kill()
    p50, p99 = np.percentile(load.seconds, [50, 99])
    rows = {
        'clients, answers compared': f'{_CLIENTS.value}, {len(load.seconds)}',
        'answers per second': f'{len(load.seconds) / seconds:.1f}',
        'seconds per answer, p50 and p99': f'{p50:.2f}, {p99:.2f}',
        'server memory at the beginning, in the middle, at the end': ', '.join(
            f'{mb:.0f} MB' for mb in memory
        ),
        'load average of the machine (1 and 5 minutes), cores': '{:.1f}, {:.1f}, {}'.format(
            *os.getloadavg()[:2], os.cpu_count()
        ),
        'SIGTERM under load': ', '.join(f'{k}: {v}' for k, v in sorted(outcomes.items())),
    } | {name: str(count) for name, count in load.counts.items()}  # fmt: skip
    table = Table('quantity', 'measured')
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    problems = [*load.problems, *(name for name in outcomes if 'cut off' in name)]
    if outcomes['exit status 0'] != 1 or len(load.seconds) != _CLIENTS.value * _REQUESTS.value:
        problems.append('the server did not exit with status 0, or an answer is missing')
    for problem in problems[:20]:
        console.print(problem)
    raise SystemExit(bool(problems))


if __name__ == '__main__':
    cli.run_main(main)
