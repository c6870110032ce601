"""Some rows of a dataset, as files of the same kind, name and line numbers as those that they come from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.job import TaskType
from finetune_trainer.data import sources
from finetune_trainer.data.images.decoding import ENDINGS as IMAGES
from finetune_trainer.data.readers import Place, Row
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.inputs import StoredFile

WHOLE_BYTES = 16 * 2**20
"""Datasets up to this size are looked at whole."""
ROWS = 200
FILES = 4
"""Of a larger one: so many rows of so many files, evenly spread over all of them."""
PICTURES = 64
"""Images are single files."""


def sample(files: Sequence[StoredFile], task: TaskType, folder: Path) -> tuple[list[NamedFile], bool]:
    """(files on this machine, whether they are all of the dataset).

    Raises:
        DataError: a file is damaged within its first rows.
    """
    if sum(file.size for file in files) <= WHOLE_BYTES:
        return [_copied(file, number, folder) for number, file in enumerate(files)], True
    pictures = [file for file in files if file.name.lower().endswith(tuple(IMAGES))]
    if task is TaskType.IMAGE_CLASSIFICATION and pictures:
        return [_copied(file, number, folder) for number, file in enumerate(_spread(pictures, PICTURES))], False
    usable, _ = sources.select(files)
    return [_head(file, number, folder) for number, file in enumerate(_spread(usable, FILES))], False


def _spread(files: Sequence[Any], count: int) -> list[Any]:
    """So many of them, from the first to the last."""
    if len(files) <= count:
        return list(files)
    return [files[number * (len(files) - 1) // (count - 1)] for number in range(count)]


def _place(number: int, folder: Path) -> Path:
    # The name by which people know a file is no part of its path here.
    folder.mkdir(parents=True, exist_ok=True)
    return folder / str(number)


def _copied(file: StoredFile, number: int, folder: Path) -> NamedFile:
    path = _place(number, folder)
    with closing(file.open(scattered=False)) as stream:
        path.write_bytes(stream.read())
    return NamedFile(file.name, path)


def _head(file: StoredFile, number: int, folder: Path) -> NamedFile:
    """The first rows of a file."""
    place, rows = Place(), []
    for item in sources.read_file(file, {}, place):
        rows.append(item)
        if len(rows) >= ROWS or place.offset >= WHOLE_BYTES:
            break
    path = _place(number, folder)
    ending, compression = sources.endings(file.name)
    values = [row.value for row in rows if isinstance(row, Row)]
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path)
        return NamedFile(file.name, path)
    data = _first_bytes(file, place.offset) if place.offset else json.dumps(values).encode()
    path.write_bytes(_compressed(data, compression))
    return NamedFile(file.name, path)


def _first_bytes(file: StoredFile, count: int) -> bytes:
    """So many bytes of the decompressed file; they end with a row."""
    with sources.opened(file) as stream:
        return stream.read(count)


def _compressed(data: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(data)
    if compression == ".zst":
        return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]
    return data
