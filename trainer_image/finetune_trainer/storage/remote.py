"""Buckets, by the calls that the store needs: requests of `s3` with patience, transfers on shared threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from zlib import crc32

from finetune_trainer.storage.batch import Batch, Progress, Work
from finetune_trainer.storage.download import ObjectDownload, run_downloads
from finetune_trainer.storage.files import Record, alone_in, file_errors, require_room
from finetune_trainer.storage.retry import patiently
from finetune_trainer.storage.s3 import S3, ObjectInfo
from finetune_trainer.storage.settings import MIB, TransferSettings
from finetune_trainer.storage.stream import ObjectReader
from finetune_trainer.storage.upload import FileUpload, Memory, Uploaded, check_answer, run_uploads
from finetune_trainer.storage.uris import Location

T = TypeVar("T")


class Buckets:
    """All buckets of one endpoint."""

    def __init__(self, s3: S3, settings: TransferSettings, pool: Executor) -> None:
        self._s3, self._settings, self._pool = s3, settings, pool
        self._memory = Memory(settings.upload_memory_bytes)
        self._never = threading.Event()

    def below(self, where: Location) -> list[ObjectInfo]:
        """All objects whose key starts with `where.key`, page by page; folder markers are none."""
        infos: list[ObjectInfo] = []
        token: str | None = None
        while True:
            page, token = self._patiently(partial(self._s3.pages, where, token))
            infos += (info for info in page if not info.uri.endswith("/"))
            if token is None:
                return infos

    def stat(self, where: Location) -> ObjectInfo:
        return self._patiently(partial(self._s3.stat, where))

    def open(self, info: ObjectInfo, where: Location, start: int, scattered: bool) -> BinaryIO:
        reader = ObjectReader(self._s3, info, start, self._settings, scattered)
        return cast(BinaryIO, BufferedReader(reader, buffer_size=MIB))

    def write(self, where: Location, data: bytes) -> None:
        def put() -> None:
            check_answer(self._s3.put(where, data, crc32(data)), data, where)

        self._patiently(put)

    def download(
        self, infos: Sequence[ObjectInfo], names: Sequence[str], directory: Path, progress: Progress | None
    ) -> list[Path]:
        total = sum(info.size for info in infos)
        with file_errors(directory, total):
            directory.mkdir(parents=True, exist_ok=True)
        with alone_in(directory):
            record = Record(directory)
            named = zip(infos, names, strict=True)
            missing = [(info, name) for info, name in named if not record.has(name, info.size, info.etag)]
            missing_bytes = sum(info.size for info, _ in missing)
            require_room(directory, missing_bytes)
            batch = Batch(self._pool, progress, total, len(infos))
            batch.count(total - missing_bytes, len(infos) - len(missing))
            work = Work(self._s3, self._settings, batch)
            run_downloads([ObjectDownload(work, info, name, directory, record) for info, name in missing], batch)
        batch.report()
        return [directory / name for name in names]

    def upload(self, files: Mapping[Location, Path], batch: Batch) -> list[Uploaded]:
        work = Work(self._s3, self._settings, batch)
        uploads = [FileUpload(work, where, path, self._memory) for where, path in files.items()]
        return run_uploads(uploads, batch)

    def delete(self, wheres: Sequence[Location]) -> None:
        for _, group in groupby(sorted(wheres, key=str), key=lambda where: where.bucket):
            self._patiently(partial(self._s3.delete, list(group)))

    def _patiently(self, action: Callable[[], T]) -> T:
        return patiently(action, self._settings, self._never)
