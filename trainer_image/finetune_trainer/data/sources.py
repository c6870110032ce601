"""Dataset files that lie on this machine -> rows with the place they came from, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from finetune_trainer.data import readers
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Row
from finetune_trainer.errors import DataError

READERS: dict[str, Callable[[str, io.BufferedReader], Iterator[Row | Problem]]] = {
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
"""What gzip, zstd and parquet raise on damaged bytes; the files are local copies, so an OSError is the content's."""


@dataclass(frozen=True)
class NamedFile:
    """A dataset file: `name` is what the user knows it by (its URI), `path` where its bytes lie now."""

    name: str
    path: Path


def select(files: Sequence[NamedFile]) -> tuple[list[NamedFile], list[str]]:
    """Tell dataset files from what else lies under a prefix, such as README.md or _SUCCESS.

    Returns:
        The readable files in the order of their names, and the names of those left out.

    Raises:
        DataError: there are no files, or none that can be read.
    """
    if not files:
        raise DataError("the dataset has no files", "check dataset.uri; it may be a file, a glob or a prefix")
    usable = sorted((file for file in files if _is_data(file.name)), key=lambda file: file.name)
    if not usable:
        names = ", ".join(file.name for file in files[:3])
        raise DataError(f"no file of the dataset has a known ending: {names}", f"known endings are {KNOWN}")
    return usable, sorted({file.name for file in files} - {file.name for file in usable})


def read(files: Sequence[NamedFile]) -> Iterator[Row | Problem]:
    """All rows of the files, in order; a file without rows is a problem of its own.

    Raises:
        DataError: a file is damaged, so that the rest of it cannot be read; names the file and the last good line.
    """
    for file in files:
        last = 0
        try:
            with closing(_open(file)) as stream:
                for item in READERS[_endings(file.name)[0]](file.name, stream):
                    last = item.line
                    yield item
        except DAMAGED as error:
            raise DataError(
                f"{file.name}: the file is damaged or cut off after line {last}: {error}", "upload the file again"
            ) from error
        if not last:
            yield Problem(file.name, 0, "the file has no rows")


def _endings(name: str) -> tuple[str, str]:
    """(format, compression) of a file's name, in lower case; '' where there is none."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


def _is_data(name: str) -> bool:
    """By its ending; names such as _SUCCESS and .part.crc are markers that other tools leave."""
    return not PurePosixPath(name).name.startswith((".", "_")) and _endings(name)[0] in READERS


def _open(file: NamedFile) -> io.BufferedReader:
    compression = _endings(file.name)[1]
    try:
        if compression == ".gz":
            return io.BufferedReader(gzip.open(file.path, "rb"), 1 << 20)
        if compression == ".zst":
            return io.BufferedReader(pa.input_stream(str(file.path), compression="zstd"), 1 << 20)
        return file.path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{file.name}: the file does not exist", "check dataset.uri") from error
