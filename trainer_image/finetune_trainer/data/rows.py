"""Encoded rows on disk: written as they come, read memory-mapped."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from finetune_trainer.data.encoding import Encoded

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "source"
"""Column: the number of the row in the files, from 0; the parts of a split text share it."""
TOKENS_HELD = 1_000_000
"""Tokens gathered before they are written: 8 MB, and batches large enough to be read quickly."""
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), (SOURCE, pa.int64())])


class RowWriter:
    """Writes encoded rows to an Arrow stream with the columns input_ids, labels and source."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._held: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._tokens = 0

    def add(self, encoded: Encoded, source: int) -> None:
        for ids, labels in encoded.parts:
            self._held.append((ids, labels, source))
            self._tokens += len(ids)
        if self._tokens >= TOKENS_HELD:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            ids, labels, sources = zip(*self._held, strict=True)
            columns = [_lists(ids), _lists(labels), pa.array(sources, pa.int64())]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._held, self._tokens = [], 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._flush()
        self._writer.close()
        self._file.close()


def open_rows(path: Path) -> Dataset:
    """A dataset over a written file; its memory is the page cache's."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _lists(arrays: tuple[np.ndarray, ...]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))
