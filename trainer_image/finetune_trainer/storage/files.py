"""Files on this machine's side of a transfer: room, errors in words, and the record of what is already there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_trainer.errors import PermissionRefusedError, TrainerError
from finetune_trainer.storage.errors import DiskFullError, MissingError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
RECORD_FILE = ".finetune-downloads.jsonl"
LOCK_FILE = ".finetune-downloads.lock"


@contextmanager
def file_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn errors of the file system on `path`, which is to take `needed_bytes`, into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _no_room(path.parent, needed_bytes, None) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionRefusedError(f"{path}: {error.strerror}", "check the volume's owner and mode") from error
        if error.errno == errno.ENOENT:
            raise MissingError(f"there is no {path}", "correct the path, or mount the volume") from error
        raise TrainerError(f"{path}: {error.strerror}") from error


def size_of(path: Path) -> int:
    with file_errors(path, 0):
        return path.stat().st_size


def require_room(directory: Path, needed_bytes: int) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        DiskFullError: the file system has less free than needed.
    """
    found = os.statvfs(directory)
    free_bytes = found.f_bavail * found.f_frsize
    if needed_bytes > free_bytes:
        raise _no_room(directory, needed_bytes, free_bytes)


def _no_room(directory: Path, needed_bytes: int, free_bytes: int | None) -> DiskFullError:
    has = "is full" if free_bytes is None else f"has {free_bytes:,} bytes free"
    return DiskFullError(
        f"{directory} {has}, {needed_bytes:,} bytes are needed there",
        "give the scratch volume more room, or read the dataset with `streaming: true`",
    )


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`: pwrite may take only a part when the disk is nearly full."""
    written = os.pwrite(file, data, offset)
    while written < len(data):
        written += os.pwrite(file, memoryview(data)[written:], offset + written)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other thread or process downloads into the folder: ranks that share it fetch once, not each."""
    with (directory / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process, however that ends
        yield


class Record:
    """Which objects lie finished in a folder, one line of JSON each, so that a killed download goes on from there.

    A file counts only while its size and time are those that were noted, so one that was touched is fetched again.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / RECORD_FILE
        self._directory = directory
        self._lock = threading.Lock()
        self._known = dict(self._read())

    def has(self, name: str, size: int, etag: str) -> bool:
        path = self._directory / name
        return path.is_file() and self._known.get(name) == [size, etag, path.stat().st_mtime_ns]

    def add(self, name: str, size: int, etag: str) -> None:
        noted = [size, etag, (self._directory / name).stat().st_mtime_ns]
        line = json.dumps([name, *noted]) + "\n"
        with self._lock, self._file.open("a") as file:
            file.write(line)

    def _read(self) -> Iterator[tuple[str, list[object]]]:
        if not self._file.exists():
            return
        for line in self._file.read_text().splitlines():
            try:
                name, *noted = json.loads(line)
            except ValueError:
                continue  # the line at which a process was killed; its file is fetched again
            yield name, noted
