"""Reading an object from front to back as a file, over any number of broken connections."""

from __future__ import annotations

import io
import threading

from finetune_trainer.storage.checksums import BlockHasher, Expectation, Kind, expectation
from finetune_trainer.storage.errors import CorruptError, TransientError
from finetune_trainer.storage.retry import Patience
from finetune_trainer.storage.s3 import S3, Body, ObjectInfo
from finetune_trainer.storage.settings import TransferSettings
from finetune_trainer.storage.uris import parse


class ObjectReader(io.RawIOBase):
    """An open object. One connection is held while it is read; a version other than the listed one is refused.

    Read from its first byte to its last it is verified, where the server keeps a checksum of the whole.

    Raises:
        ChangedError: it was replaced meanwhile.
        CorruptError: at its end, when what came is not what was stored.
    """

    def __init__(self, s3: S3, info: ObjectInfo, start: int, settings: TransferSettings) -> None:
        self._s3, self._where, self._info = s3, parse(info.uri), info
        self._position = start
        self._settings = settings
        self._body: Body | None = None
        self._expectation = Expectation(Kind.NONE)
        self._hasher = BlockHasher(None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, limit: int) -> bytes:
        patience = Patience(self._settings, threading.Event())
        while limit and self._position < self._info.size:
            try:
                return self._read_once(limit)
            except TransientError as error:
                self._drop()
                patience.pause(error)
        return b""

    def _read_once(self, limit: int) -> bytes:
        if self._body is None:
            self._body = self._s3.open(self._where, self._info.etag, self._position, None)
            if self._position == 0:
                self._expectation = expectation(self._body.headers)
                self._hasher = BlockHasher(self._expectation.algorithm)
        data = self._body.read(limit)
        if not data:
            raise TransientError(f"{self._where} ended early")
        self._position += len(data)
        self._hasher.update(data)
        if self._position == self._info.size and not self._expectation.is_met_by(self._hasher.blocks()):
            raise CorruptError(f"{self._where} arrived with a wrong checksum", "read it again")
        return data

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
