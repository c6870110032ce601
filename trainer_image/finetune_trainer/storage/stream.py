"""Reading an object as a file, over any number of broken connections."""

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
    """An open object; a version other than the listed one is refused.

    Read from its first byte to its last it is verified, where the server keeps a checksum of the whole.

    Args:
        scattered: whether it is read here and there, so that each read asks for its own range; else one connection is
            held, and all that follows comes over it.

    Raises:
        ChangedError: it was replaced meanwhile.
        CorruptError: at its end, when what came is not what was stored.
    """

    def __init__(self, s3: S3, info: ObjectInfo, start: int, settings: TransferSettings, scattered: bool) -> None:
        self._s3, self._where, self._info = s3, parse(info.uri), info
        self._position = start
        self._scattered = scattered
        self._settings = settings
        self._body: Body | None = None
        self._end = start
        self._expectation = Expectation(Kind.NONE)
        self._hasher = BlockHasher(None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if base + offset != self._position:
            self._drop()
            self._position = base + offset
            self._expectation, self._hasher = Expectation(Kind.NONE), BlockHasher(None)
        return self._position

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
            self._end = min(self._position + limit, self._info.size) if self._scattered else self._info.size
            end = self._end if self._scattered else None
            self._body = self._s3.open(self._where, self._info.etag, self._position, end)
            if self._position == 0 and not self._scattered:
                self._expectation = expectation(self._body.headers)
                self._hasher = BlockHasher(self._expectation.algorithm)
        data = self._body.read(limit)
        if not data:
            raise TransientError(f"{self._where} ended early")
        self._position += len(data)
        self._hasher.update(data)
        if self._position == self._info.size and not self._expectation.is_met_by(self._hasher.blocks()):
            raise CorruptError(f"{self._where} arrived with a wrong checksum", "read it again")
        if self._position == self._end:
            self._drop()
        return data

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
