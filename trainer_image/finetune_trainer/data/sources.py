"""Dataset files -> rows with the place they came from, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar, cast

import pyarrow as pa

from finetune_trainer.data import readers
from finetune_trainer.data.columns import Columns, renamed
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Place, Row
from finetune_trainer.errors import DataError

READERS: dict[str, Callable[[str, io.BufferedReader, Place], Iterator[Row | Problem]]] = {
    ".jsonl": readers.json_lines,
    ".ndjson": readers.json_lines,
    ".json": readers.json_document,
    ".csv": readers.comma_separated,
    ".parquet": readers.parquet,
    ".txt": readers.text_lines,
}
COMPRESSIONS = (".gz", ".zst")
KNOWN = f"{', '.join(READERS)}, plain or compressed ({', '.join(COMPRESSIONS)})"
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, OSError, pa.ArrowException)
"""What gzip, zstd and parquet raise on damaged bytes; what goes wrong between us and a store has errors of its own."""


class DataFile(Protocol):
    """A file of a dataset, wherever its bytes are."""

    @property
    def name(self) -> str:
        """What the user knows it by: its URI."""

    def open(self, scattered: bool) -> BinaryIO:
        """Its bytes as they are stored, seekable; `scattered` when they will be read here and there."""


class SizedFile(DataFile, Protocol):
    """A file of which it is known how large it is, and which version."""

    @property
    def size(self) -> int:
        """Bytes, as stored."""

    @property
    def version(self) -> str:
        """Another one where the content is another."""


File = TypeVar("File", bound=DataFile)


@dataclass(frozen=True)
class NamedFile:
    """A dataset file on this machine: `path` is where its bytes lie now."""

    name: str
    path: Path

    def open(self, scattered: bool) -> BinaryIO:
        try:
            return self.path.open("rb")
        except FileNotFoundError as error:
            raise DataError(f"{self.name}: the file does not exist", "check dataset.uri") from error


def select(files: Sequence[File]) -> tuple[list[File], list[str]]:
    """Tell dataset files from what else lies under a prefix, such as README.md or _SUCCESS.

    Returns:
        The readable files in the order of their names, and the names of those left out.

    Raises:
        DataError: there are no files, none that can be read, or one that is compressed twice.
    """
    if not files:
        raise DataError("the dataset has no files", "check dataset.uri; it may be a file, a glob or a prefix")
    usable = sorted((file for file in files if _is_data(file.name)), key=lambda file: file.name)
    if not usable:
        names = ", ".join(file.name for file in files[:3])
        raise DataError(f"no file of the dataset has a known ending: {names}", f"known endings are {KNOWN}")
    for file in usable:
        if endings(file.name)[0] == ".parquet" and endings(file.name)[1]:
            raise DataError(
                f"{file.name}: a parquet file is read from its end, so it cannot be compressed as a whole",
                "unpack it; parquet compresses its columns itself, e.g. by compression='zstd'",
            )
    return usable, sorted({file.name for file in files} - {file.name for file in usable})


def read(files: Sequence[DataFile], columns: Columns) -> Iterator[Row | Problem]:
    """All rows of the files, in order, with the fields of `columns` renamed."""
    for file in files:
        yield from read_file(file, columns, Place())


def read_file(file: DataFile, columns: Columns, place: Place) -> Iterator[Row | Problem]:
    """The rows of a file from a place on, which moves along; a file without rows is a problem of its own.

    Raises:
        DataError: the file is damaged, so that the rest of it cannot be read; names the file and the last good line.
    """
    last = place.line
    try:
        with opened(file) as stream:
            for item in READERS[endings(file.name)[0]](file.name, stream, place):
                last = item.line
                place.rows += 1
                yield renamed(item, columns)
    except DAMAGED as error:
        raise DataError(
            f"{file.name}: the file is damaged or cut off after line {last}: {error}", "upload the file again"
        ) from error
    if not place.rows:
        yield Problem(file.name, 0, "the file has no rows")


def endings(name: str) -> tuple[str, str]:
    """(format, compression) of a file's name, in lower case; '' where there is none."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


def _is_data(name: str) -> bool:
    """By its ending; names such as _SUCCESS and .part.crc are markers that other tools leave."""
    return not PurePosixPath(name).name.startswith((".", "_")) and endings(name)[0] in READERS


@contextmanager
def opened(file: DataFile) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed."""
    ending, compression = endings(file.name)
    with closing(file.open(scattered=ending == ".parquet")) as raw:
        yield _decompressed(raw, compression)


def _decompressed(raw: BinaryIO, compression: str) -> io.BufferedReader:
    streams: dict[str, Callable[[], Any]] = {
        ".gz": lambda: gzip.GzipFile(fileobj=raw),
        ".zst": lambda: pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"),
    }
    if compression in streams:
        return io.BufferedReader(streams[compression](), 1 << 20)
    return cast(io.BufferedReader, raw)
