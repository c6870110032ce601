"""Volumes and folders of this machine, by the same calls as buckets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from isal.isal_zlib import crc32

from finetune_trainer.storage.batch import Batch, Progress
from finetune_trainer.storage.checksums import READ_BYTES, crc_hex
from finetune_trainer.storage.errors import ChangedError, MissingContainerError, MissingError
from finetune_trainer.storage.files import file_errors, size_of, write_at
from finetune_trainer.storage.s3 import ObjectInfo
from finetune_trainer.storage.upload import Uploaded
from finetune_trainer.storage.uris import Location


class LocalFiles:
    """file:// is the whole file system, pvc://claim is the volume mounted below `volumes`."""

    def __init__(self, volumes: Path) -> None:
        self._volumes = volumes

    def path(self, where: Location) -> Path:
        return self._root(where) / where.key

    def below(self, where: Location) -> list[ObjectInfo]:
        """All files whose path starts with `where`, in no order."""
        root = self._root(where)
        if where.scheme == "pvc" and not root.is_dir():
            raise MissingContainerError(
                f"there is no volume at {root} for {where}", "mount the claim, or correct its name"
            )
        keys = self._keys(root, root / where.base)
        return [self._info(where.at(key)) for key in keys if key.startswith(where.key)]

    def stat(self, where: Location) -> ObjectInfo:
        path = self.path(where)
        if not path.is_file():
            raise MissingError(f"there is no file {path} ({where})", "correct the URI, or mount the volume")
        return self._info(where)

    def open(self, info: ObjectInfo, where: Location, start: int, scattered: bool) -> BinaryIO:
        with file_errors(self.path(where), info.size):
            file = self.path(where).open("rb")
            if self._info(where).etag != info.etag:
                file.close()
                raise ChangedError(f"{where} was replaced after it was listed", "start again")
        file.seek(start)
        return file

    def write(self, where: Location, data: bytes) -> None:
        with file_errors(self.path(where), len(data)):
            _write_whole(self.path(where), iter((data,)))

    def download(
        self, infos: Sequence[ObjectInfo], wheres: Sequence[Location], progress: Progress | None
    ) -> list[Path]:
        """The files where they are: a volume is read in place, never copied."""
        if progress:
            total = sum(info.size for info in infos)
            progress(total, total, len(infos), len(infos))
        return [self.path(where) for where in wheres]

    def upload(self, files: Mapping[Location, Path], batch: Batch) -> list[Uploaded]:
        done = []
        for where, path in files.items():
            size = size_of(path)
            with file_errors(self.path(where), size):
                crc = _write_whole(self.path(where), _blocks(path, batch))
            batch.count(new_files=1)
            done.append(Uploaded(str(where), size, crc_hex(crc)))
        return done

    def delete(self, wheres: Sequence[Location]) -> None:
        for where in wheres:
            path = self.path(where)
            with file_errors(path, 0):
                path.unlink(missing_ok=True)
                if path.parent.is_dir() and not any(path.parent.iterdir()):
                    path.parent.rmdir()  # a bucket has no empty folders either

    def _root(self, where: Location) -> Path:
        return self._volumes / where.bucket if where.scheme == "pvc" else Path("/")

    def _info(self, where: Location) -> ObjectInfo:
        found = self.path(where).stat()
        return ObjectInfo(str(where), found.st_size, f"{found.st_size}-{found.st_mtime_ns}")

    def _keys(self, root: Path, folder: Path) -> Iterator[str]:
        for parent, _, names in os.walk(folder):
            for name in names:
                if not (name.startswith(".") and name.endswith(".part")):  # one that is being written
                    yield str(Path(parent, name).relative_to(root))


def _blocks(path: Path, batch: Batch) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            yield data
            batch.count(new_bytes=len(data))
            batch.report()


def _write_whole(path: Path, blocks: Iterator[bytes]) -> int:
    """Write a file whole or not at all, safely on the disk before it has its name; its CRC32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    crc, position = 0, 0
    try:
        with temporary.open("wb") as file:
            for data in blocks:
                write_at(file.fileno(), data, position)
                position += len(data)
                crc = crc32(data, crc)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return crc
