"""The images of a part on disk: encoded as they came, with the places of those that are files; read memory-mapped."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from finetune_trainer.data.class_columns import LABEL
from finetune_trainer.data.images.decoding import Encoded
from finetune_trainer.data.images.found import Picture
from finetune_trainer.data.rows import SOURCE

BYTES_HELD = 16 * 1024 * 1024
"""Bytes gathered before they are written: images of a table are copied, files are only named."""
COLUMNS = {"path": pa.string(), "image": pa.binary(), "file": pa.string(), "line": pa.int64(), LABEL: pa.string()}
SCHEMA = pa.schema([*COLUMNS.items(), (SOURCE, pa.int64())])


class IndexWriter:
    """Writes an Arrow stream with a row for each image: `path` or `image`, its class in words, and where it is from."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._held: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, picture: Picture, source: int) -> None:
        """Args:
        source: the image's number in the dataset.
        """
        row = row_of(picture)
        self._held.append(row | {SOURCE: source})
        # What a row takes beside its image.
        self._bytes += 512 + len(row["image"] or b"")
        if self._bytes >= BYTES_HELD:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._held, schema=SCHEMA))
        self._held, self._bytes = [], 0

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._flush()
        self._writer.close()
        self._file.close()


def row_of(picture: Picture) -> dict[str, Any]:
    """An image as the row of an index."""
    is_file = isinstance(picture.source, Path)
    source = {"path": str(picture.source), "image": None} if is_file else {"path": None, "image": picture.source}
    return source | {"file": picture.file, "line": picture.line, LABEL: picture.label}


def encoded(row: dict[str, Any]) -> Encoded:
    """The image of a row of an index."""
    return Path(row["path"]) if row["path"] is not None else row["image"]
