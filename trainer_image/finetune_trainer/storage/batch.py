"""Many tasks of one transfer on the shared threads: progress, first failure, giving up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from dataclasses import dataclass

from finetune_trainer.storage.s3 import S3
from finetune_trainer.storage.settings import TransferSettings

Progress = Callable[[int, int, int, int], None]
"""Called with bytes done, bytes in all, files done, files in all; in the thread that asked for the transfer."""

PROGRESS_SECONDS = 0.5


class Batch:
    """The tasks of one transfer. Tasks look at `stop` between blocks of bytes and end when it is set."""

    def __init__(self, pool: Executor, progress: Progress | None, total_bytes: int, total_files: int) -> None:
        self.stop = threading.Event()
        self._pool = pool
        self._progress = progress
        self._totals = total_bytes, total_files
        self._lock = threading.Lock()
        self._bytes = 0
        self._files = 0

    def count(self, new_bytes: int = 0, new_files: int = 0) -> None:
        """Called by tasks; negative when bytes turn out to be wrong."""
        with self._lock:
            self._bytes += new_bytes
            self._files += new_files

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run all tasks; on the first failure, or when the progress callback raises, end the others and raise."""
        futures = [self._pool.submit(task) for task in tasks]
        try:
            self._watch(futures)
        except BaseException:
            self.stop.set()
            for future in futures:
                future.cancel()
            wait(futures)  # they still hold files
            raise

    def _watch(self, futures: list[Future[None]]) -> None:
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            self.report()

    def report(self) -> None:
        if self._progress:
            total_bytes, total_files = self._totals
            self._progress(self._bytes, total_bytes, self._files, total_files)


@dataclass(frozen=True)
class Work:
    """What every task of a transfer with S3 needs."""

    s3: S3
    settings: TransferSettings
    batch: Batch
