"""Encoded rows on disk: written as they come, read memory-mapped."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "source"
"""Column: the number of the row in the files, from 0; the parts of a split text share it."""
TOKENS_HELD = 1_000_000
"""Tokens gathered before they are written: 8 MB, and batches large enough to be read quickly."""
ROWS_HELD = 10_000
"""Of short rows fewer tokens are gathered: a row held costs more than its tokens."""
TEXT_COLUMNS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


class RowWriter:
    """Writes encoded rows to an Arrow stream with the given columns, `input_ids` among them, and `source`."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self._schema = columns.append(pa.field(SOURCE, pa.int64()))
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        self._held: list[dict[str, Any]] = []
        self._tokens = 0

    def add(self, samples: list[dict[str, Any]], source: int) -> None:
        for sample in samples:
            self._held.append(sample | {SOURCE: source})
            self._tokens += len(sample["input_ids"])
        if self._tokens >= TOKENS_HELD or len(self._held) >= ROWS_HELD:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            columns = [_column([sample[field.name] for sample in self._held], field.type) for field in self._schema]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
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


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not isinstance(values[0], np.ndarray):
        return pa.array(values, kind)
    # Several times faster than pa.array, and most of what is written.
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in values])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), kind.value_type))
