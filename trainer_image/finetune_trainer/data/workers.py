"""Encoding in several processes, in order and with a bounded number of rows in flight.

The processes are started fresh, not forked: the trainer has threads and perhaps a device context, which do not
survive a fork. They are not started by `multiprocessing` either, which would import the trainer's main module, and
torch with it, into each of them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any, TypeVar

from finetune_trainer.errors import TrainerError

Given = TypeVar("Given")
Made = TypeVar("Made")

CHUNK_ROWS = 64
INLINE_ROWS = 2000
"""Up to so many rows no process is started: that takes a second or two, in which this one is done."""


def encode_all(
    function: Callable[[list[Given]], list[Made]], rows: Iterable[Given], processes: int
) -> Generator[tuple[Given, Made], None, None]:
    """(row, result) for every row, in order, whatever the number of processes.

    Args:
        function: picklable; takes a list of rows and returns one result for each.
        rows: read only as fast as results are taken.
        processes: how many work at the same time; 1 does everything in this one.
    """
    rows = iter(rows)
    first = list(islice(rows, INLINE_ROWS + 1))
    rows = chain(first, rows)
    if processes == 1 or len(first) <= INLINE_ROWS:
        return here(function, rows, CHUNK_ROWS)
    return in_processes(function, rows, processes, CHUNK_ROWS)


def here(
    function: Callable[[list[Given]], list[Made]], rows: Iterable[Given], chunk_rows: int
) -> Generator[tuple[Given, Made], None, None]:
    """As encode_all, in this process, in chunks of so many rows."""
    for chunk in _chunks(iter(rows), chunk_rows):
        yield from zip(chunk, function(chunk), strict=True)


def in_processes(
    function: Callable[[list[Given]], list[Made]], rows: Iterable[Given], processes: int, chunk_rows: int
) -> Generator[tuple[Given, Made], None, None]:
    """As encode_all, in so many processes beside this one."""
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_Worker(function)))
        threads = stack.enter_context(ThreadPoolExecutor(processes))
        pending: deque[tuple[list[Given], Future[Any]]] = deque()
        for chunk in _chunks(iter(rows), chunk_rows):
            pending.append((chunk, threads.submit(_ask, idle, chunk)))
            # Twice as many as can be worked on: nobody waits, and memory stays bounded.
            if len(pending) >= 2 * processes:
                given, answer = pending.popleft()
                yield from zip(given, answer.result(), strict=True)
        while pending:
            given, answer = pending.popleft()
            yield from zip(given, answer.result(), strict=True)


def _chunks(rows: Iterator[Given], size: int) -> Iterator[list[Given]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _ask(idle: SimpleQueue[_Worker], chunk: list[Any]) -> list[Any]:
    worker = idle.get()
    try:
        return worker.ask(chunk)
    finally:
        idle.put(worker)


class _Worker:
    """A process that answers lists of rows; it ends with this process, however that ends, since its input closes."""

    def __init__(self, function: Callable[[list[Any]], list[Any]]) -> None:
        code = f"from {__name__} import serve; serve()"
        # The tokenizer's own threads would compete with the other processes for the same cores.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # A Ctrl-C at the terminal is for the trainer, which ends this one.
            start_new_session=True,
        )
        self._send(function)

    def ask(self, chunk: list[Any]) -> list[Any]:
        try:
            self._send(chunk)
            ok, answer = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise TrainerError(
                f"a process that tokenises the data ended with code {self._process.wait()}",
                "if it was killed for memory, raise resources.memory",
            ) from error
        if not ok:
            raise answer
        return answer

    def _send(self, value: object) -> None:
        pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)  # type: ignore[arg-type]
        self._process.stdin.flush()  # type: ignore[union-attr]

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """The other end: reads the function, then chunks, and answers each, until its input closes."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever a library prints must not get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    function = pickle.load(requests)
    while True:
        try:
            chunk = pickle.load(requests)
        except EOFError:
            return
        answers.write(_answer(function, chunk))
        answers.flush()


def _answer(function: Callable[[list[Any]], list[Any]], chunk: list[Any]) -> bytes:
    try:
        return pickle.dumps((True, function(chunk)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)


def usable_cores() -> int:
    """Cores that this process may run on; a container's CPU set counts, the machine's total does not."""
    return len(os.sched_getaffinity(0))
