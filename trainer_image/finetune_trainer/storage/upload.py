"""Files to objects: small ones by one PUT, large ones by parallel parts, with bounded memory and checked sums."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from botocore.exceptions import ClientError

from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.batch import Batch, Work
from finetune_trainer.storage.checksums import (
    MD5_ETAG,
    Block,
    crc_base64,
    crc_hex,
    is_encrypted_by_key,
    whole_crc32,
)
from finetune_trainer.storage.errors import TransientError
from finetune_trainer.storage.files import file_errors, size_of
from finetune_trainer.storage.retry import CancelledError, patiently
from finetune_trainer.storage.settings import MIB, TransferSettings
from finetune_trainer.storage.uris import Location

log = logging.getLogger(__name__)

MAX_PARTS = 10_000
"""S3's bound on the parts of one object."""


@dataclass(frozen=True)
class Uploaded:
    """An object that was written: its size in bytes and its CRC32 as eight hexadecimal digits."""

    uri: str
    size: int
    crc32: str


class Memory:
    """A number of bytes that uploads share. A request larger than all of it is granted alone."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._freed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._freed:
                self._used -= count
                self._freed.notify_all()


def part_size(size: int, settings: TransferSettings) -> int:
    """The settings' part size, or whole MiB more where the object would need too many of those."""
    fewest = -(-size // MAX_PARTS)
    return max(settings.part_bytes, -(-fewest // MIB) * MIB)


class FileUpload:
    """One file on its way to one object. Its parts are sent by several threads; the last one completes it."""

    def __init__(self, work: Work, where: Location, path: Path, memory: Memory) -> None:
        self._s3, self._settings, self._batch = work.s3, work.settings, work.batch
        self._where, self._path, self._memory = where, path, memory
        self._size = size_of(path)
        self._part_bytes = part_size(self._size, work.settings)
        self._lock = threading.Lock()
        self._upload_id = ""
        self._blocks: dict[int, Block] = {}
        self._sent: dict[int, dict[str, Any]] = {}

    @property
    def in_parts(self) -> bool:
        return self._size > self._part_bytes

    def begin(self) -> None:
        """Open the multipart upload, for files that go in parts."""
        checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        self._upload_id = self._request("create_multipart_upload", **checksum)["UploadId"]

    def tasks(self) -> list[Callable[[], None]]:
        """What to run, in any order and on any thread, after the beginning."""
        starts = range(0, max(self._size, 1), self._part_bytes)
        self._left = len(starts)
        return [partial(self._send, number, start) for number, start in enumerate(starts, 1)]

    def result(self) -> Uploaded:
        return Uploaded(str(self._where), self._size, crc_hex(self._crc))

    def abort(self) -> None:
        """Drop the parts of an upload that will not be completed: they would be kept, and paid for, without end."""
        if self._upload_id:
            self._s3.request("abort_multipart_upload", self._where, Key=self._where.key, UploadId=self._upload_id)

    def _send(self, number: int, start: int) -> None:
        length = min(self._part_bytes, self._size - start)
        with self._memory.taken(length):
            if self._batch.stop.is_set():
                raise CancelledError
            data = self._read(start, length)
            crc = crc32(data)
            patiently(partial(self._put, number, data, crc), self._settings, self._batch.stop)
        self._blocks[number] = Block(crc.to_bytes(4, "big"), length)
        self._batch.count(new_bytes=length)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _read(self, start: int, length: int) -> bytearray:
        data = bytearray(length)
        with file_errors(self._path, self._size), self._path.open("rb", buffering=0) as file:
            file.seek(start)
            view = memoryview(data)
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise TrainerError(f"{self._path} became shorter while it was uploaded")
        return data

    def _put(self, number: int, data: bytearray, crc: int) -> None:
        if not self._upload_id:
            return check_answer(self._s3.put(self._where, data, crc), data, self._where)
        numbered = {"Key": self._where.key, "UploadId": self._upload_id, "PartNumber": number}
        answer = self._s3.request("upload_part", self._where, Body=data, ChecksumCRC32=crc_base64(crc), **numbered)
        check_answer(answer, data, self._where)
        kept: dict[str, Any] = {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}
        self._sent[number] = {"PartNumber": number, **kept}

    def _finish(self) -> None:
        self._crc = whole_crc32([self._blocks[number] for number in sorted(self._blocks)])
        if self._upload_id:
            patiently(self._complete, self._settings, self._batch.stop)
            self._upload_id = ""
        self._batch.count(new_files=1)

    def _complete(self) -> None:
        parts: list[dict[str, Any]] = [self._sent[number] for number in sorted(self._sent)]
        parameters: dict[str, Any] = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": parts}}
        if all("ChecksumCRC32" in part for part in parts):
            parameters |= {"ChecksumCRC32": crc_base64(self._crc), "ChecksumType": "FULL_OBJECT"}
        try:
            self._s3.request("complete_multipart_upload", self._where, Key=self._where.key, **parameters)
        except TrainerError as error:
            if not self._was_completed(error):
                raise

    def _was_completed(self, error: TrainerError) -> bool:
        """Whether an earlier try, whose answer was lost, did it: then the upload is unknown and the object is ours."""
        cause = error.__cause__
        if not isinstance(cause, ClientError) or cause.response["Error"]["Code"] != "NoSuchUpload":
            return False
        found = self._s3.stat(self._where)
        return found.size == self._size and found.crc32 in (None, crc_hex(self._crc))

    def _request(self, operation: str, **parameters: Any) -> dict[str, Any]:
        request = partial(self._s3.request, operation, self._where, Key=self._where.key, **parameters)
        return patiently(request, self._settings, self._batch.stop)


def check_answer(answer: dict[str, Any], data: bytes | bytearray, where: Location) -> None:
    """Make sure that the server has our bytes: it compared the CRC32, or else its ETag is their MD5."""
    etag = str(answer.get("ETag", "")).strip('"')
    if "ChecksumCRC32" in answer or is_encrypted_by_key(answer) or not MD5_ETAG.fullmatch(etag):
        return
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
        raise TransientError(f"{where} was stored with other bytes than were sent")


def run_uploads(uploads: Sequence[FileUpload], batch: Batch) -> list[Uploaded]:
    """Send and complete all; on failure no parts are left in the bucket."""
    try:
        batch.run(upload.begin for upload in uploads if upload.in_parts)
        batch.run(task for upload in uploads for task in upload.tasks())
        return [upload.result() for upload in uploads]
    except BaseException:
        _abort(uploads)
        raise


def _abort(uploads: Sequence[FileUpload]) -> None:
    """One try each, and none after the first that fails: where the store is away each would only cost its time."""
    try:
        for upload in uploads:
            upload.abort()
    except (TransientError, TrainerError) as error:
        log.warning("parts of unfinished uploads stay in the bucket: %s", error)
