"""Whole rows put together into packs, as many tokens to each as fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from finetune_trainer.data.rows import TEXT_COLUMNS, open_rows

if TYPE_CHECKING:
    from datasets import Dataset

BIN_TOKENS = 2_000_000
"""Tokens among which rows are sought that fill a pack: more fill them no better, and these take 50 MB."""
BIN_ROWS = 20_000
"""Of short rows fewer tokens are looked at."""
LENGTHS = "seq_lengths"
"""Column: the documents' lengths, in order."""
PACK_COLUMNS = TEXT_COLUMNS.append(pa.field(LENGTHS, pa.list_(pa.int32())))


def pack(dataset: Dataset, max_length: int, file: Path, progress: Callable[[int], None] = lambda rows: None) -> Dataset:
    """Best-fit-decreasing packs of whole rows, none longer than max_length.

    Args:
        dataset: columns input_ids and labels, rows of 1 to max_length tokens.
        file: where the packs are written.
        progress: called with the rows that are packed so far.

    Returns:
        The columns of PACK_COLUMNS, memory-mapped; the same for the same rows.
    """
    tokens_per_row = pc.mean(pc.list_value_length(dataset.data.column("input_ids"))).as_py() or 1
    rows = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, PACK_COLUMNS) as writer:
        source = dataset.select_columns(TEXT_COLUMNS.names).with_format("arrow")
        for table in source.iter(min(ceil(BIN_TOKENS / tokens_per_row), BIN_ROWS)):
            writer.write_batch(_packed(table, max_length))
            rows += len(table)
            progress(rows)
    return open_rows(file)


def best_fit(lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Numbers of rows by pack: the longest first, each into the fullest pack that has room (best fit decreasing).

    At most 11/9 of the fewest packs that could do, and 4 more (Johnson, Demers, Ullman, Garey and Graham, "Worst-case
    performance bounds for simple one-dimensional packing algorithms", 1974).

    Args:
        lengths: of the rows, none longer than the capacity.
    """
    packs: list[list[int]] = []
    # Packs by the room that they have left, and what rooms there are, in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        if left := room - length:
            if left not in by_room:
                insort(rooms, left)
                by_room[left] = []
            by_room[left].append(number)
    return packs


def _packed(table: pa.Table, max_length: int) -> pa.RecordBatch:
    table = table.combine_chunks()
    lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int32)
    packs = best_fit(lengths, max_length)
    order = np.concatenate([np.asarray(rows) for rows in packs])
    documents = np.cumsum([0, *map(len, packs)]).astype(np.int32)
    tokens = np.concatenate([[0], np.cumsum(lengths[order])])[documents].astype(np.int32)
    flat = [table[name].take(pa.array(order)).combine_chunks().flatten() for name in TEXT_COLUMNS.names]
    columns = [pa.ListArray.from_arrays(tokens, values) for values in flat]
    columns.append(pa.ListArray.from_arrays(documents, pa.array(lengths[order])))
    return pa.record_batch(columns, schema=PACK_COLUMNS)
