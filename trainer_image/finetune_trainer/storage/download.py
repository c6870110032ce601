"""Objects to files: parallel ranged GETs straight to disk, resumed where they broke, verified, renamed when right."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from finetune_trainer.storage.batch import Batch, Work
from finetune_trainer.storage.checksums import READ_BYTES, Block, BlockHasher, Expectation, Kind, expectation
from finetune_trainer.storage.errors import ChangedError, CorruptError, TransientError
from finetune_trainer.storage.files import Record, file_errors, write_at
from finetune_trainer.storage.retry import CancelledError, Patience, patiently
from finetune_trainer.storage.s3 import ObjectInfo
from finetune_trainer.storage.uris import parse

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an object is fetched before wrong bytes are no accident any more."""


class ObjectDownload:
    """One object on its way into one file. Its ranges are fetched by several threads; the last one finishes it."""

    def __init__(self, work: Work, info: ObjectInfo, name: str, directory: Path, record: Record) -> None:
        self._s3, self._settings, self._batch = work.s3, work.settings, work.batch
        self._info, self._where = info, parse(info.uri)
        self._name, self._path, self._record = name, directory / name, record
        self._part = self._path.with_name(f".{self._path.name}.part")
        self._lock = threading.Lock()
        self._file: int | None = None
        self._expectation: Expectation | None = None
        self._range_bytes = work.settings.range_bytes
        self._blocks: dict[int, list[Block]] = {}

    @property
    def needs_plan(self) -> bool:
        """Whether the checksum must be known before the ranges are cut; a small plain object brings it along."""
        return self._info.size > self._settings.range_bytes or "-" in self._info.etag

    def plan(self) -> None:
        """Ask for the checksum and, where it is one of parts, for their size, so that ranges are whole parts."""
        head = self._head()
        found = expectation(head)
        if found.kind is Kind.NONE and "-" in self._info.etag:
            found = expectation(head, int(self._head(PartNumber=1)["ContentLength"]))
        if found.part_bytes:
            self._range_bytes = found.part_bytes * max(1, self._settings.range_bytes // found.part_bytes)
        self._expectation = found

    def tasks(self) -> list[Callable[[], None]]:
        """What to run, in any order and on any thread, after the plan."""
        starts = range(0, max(self._info.size, 1), self._range_bytes)
        self._left = len(starts)
        return [partial(self._fetch, start) for start in starts]

    def discard(self) -> None:
        """Leave nothing half-written behind."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._part.unlink(missing_ok=True)

    def _head(self, **parameters: Any) -> dict[str, Any]:
        head = partial(self._s3.head, self._where, IfMatch=f'"{self._info.etag}"', **parameters)
        answer = patiently(head, self._settings, self._batch.stop)
        if answer["ETag"].strip('"') != self._info.etag:
            raise ChangedError(f"{self._where} was replaced after it was listed", "start again")
        return answer

    def _fetch(self, start: int) -> None:
        with file_errors(self._path, self._info.size):
            self._open()
            self._blocks[start] = self._copy(start)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _open(self) -> None:
        with self._lock:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                # The room is taken at once, so a disk that fills up says so before the bytes are fetched.
                os.posix_fallocate(self._file, 0, max(self._info.size, 1))
                os.ftruncate(self._file, self._info.size)

    def _copy(self, start: int) -> list[Block]:
        """Fetch the range that begins at `start`; after a failure go on at the byte where it happened."""
        end = min(start + self._range_bytes, self._info.size)
        patience = Patience(self._settings, self._batch.stop)
        hasher: BlockHasher | None = None
        buffer = memoryview(bytearray(self._settings.read_bytes))
        position = start
        while position < end:
            try:
                whole = end == self._info.size
                with closing(self._s3.open(self._where, self._info.etag, position, None if whole else end)) as body:
                    hasher = hasher or self._hasher(body.headers)
                    while position < end:
                        count = body.readinto(buffer[: end - position])
                        if not count:
                            raise TransientError(f"{self._where} ended early")
                        self._take(buffer[:count], position, hasher)
                        position += count
                        patience.progress()
            except TransientError as error:
                patience.pause(error)
        return hasher.blocks() if hasher else []

    def _take(self, data: memoryview, position: int, hasher: BlockHasher) -> None:
        if self._batch.stop.is_set():
            raise CancelledError
        assert self._file is not None
        write_at(self._file, data, position)
        hasher.update(data)
        self._batch.count(new_bytes=len(data))

    def _hasher(self, headers: dict[str, Any]) -> BlockHasher:
        if self._expectation is None:
            self._expectation = expectation(headers)
        algorithm = self._expectation.algorithm
        if self._expectation.kind is Kind.MD5 and self._info.size > self._range_bytes:
            algorithm = None  # MD5 goes from first to last byte, so ranges cannot help: it is taken from the file
        return BlockHasher(algorithm, self._expectation.part_bytes)

    def _finish(self) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            if self._is_right():
                return self._keep()
            log.warning("%s arrived with a wrong checksum (attempt %d of %d)", self._where, attempt, ATTEMPTS)
            if attempt < ATTEMPTS and self._comes_the_same_again():
                return self._keep()
        raise CorruptError(
            f"{self._where} arrived {ATTEMPTS} times with a checksum other than the one that the server keeps",
            "upload the object again; if that does not help, look for a faulty proxy or disk",
        )

    def _comes_the_same_again(self) -> bool:
        """Fetch once more. True where the sum was one of parts and the same bytes came twice: then they are right and
        the parts were not all of the size of the first, which S3 allows and tells nobody."""
        before = self._blocks
        self._batch.count(new_bytes=-self._info.size)
        with file_errors(self._path, self._info.size):
            self._blocks = {start: self._copy(start) for start in sorted(before)}
        assert self._expectation is not None
        return bool(self._expectation.part_bytes) and self._blocks == before

    def _is_right(self) -> bool:
        wanted = self._expectation
        if wanted is None:  # an empty object: there was nothing to ask
            return True
        if wanted.kind is Kind.MD5 and self._info.size > self._range_bytes:
            return self._file_md5() == wanted.value
        return wanted.is_met_by([block for start in sorted(self._blocks) for block in self._blocks[start]])

    def _file_md5(self) -> bytes:
        digest = hashlib.md5(usedforsecurity=False)
        assert self._file is not None
        for offset in range(0, self._info.size, READ_BYTES):
            digest.update(os.pread(self._file, READ_BYTES, offset))
        return digest.digest()

    def _keep(self) -> None:
        assert self._file is not None
        with file_errors(self._path, self._info.size):
            os.close(self._file)
            self._file = None
            os.replace(self._part, self._path)
            self._record.add(self._name, self._info.size, self._info.etag)
        self._batch.count(new_files=1)


def run_downloads(downloads: Sequence[ObjectDownload], batch: Batch) -> None:
    """Plan, fetch and finish all; on failure remove what is half-written."""
    try:
        batch.run(download.plan for download in downloads if download.needs_plan)
        batch.run(task for download in downloads for task in download.tasks())
    finally:
        for download in downloads:
            with suppress(OSError):  # an error on its way out matters more than one of tidying
                download.discard()
