"""The column with the classes of rows: their names, their numbers, and how many rows each has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from finetune_trainer.data.splits import TRAINING

LABEL = "label"
"""What stands in the data: a class by its name, several of them, or a number."""
SHOWN_CLASSES = 100


def numbered(names: pa.Array, classes: tuple[str, ...]) -> pa.Array:
    """Names, or lists of them, as numbers of classes."""
    if not pa.types.is_list(names.type):
        return pc.index_in(names, value_set=pa.array(classes)).cast(pa.int64())
    numbers = pc.index_in(names.flatten(), value_set=pa.array(classes)).cast(pa.int64())
    return pa.ListArray.from_arrays(names.offsets, numbers)


def counts(classes: tuple[str, ...], labels: Iterable[Any]) -> dict[str, int]:
    """Rows of each class, the commonest first."""
    found = dict.fromkeys(classes, 0)
    for label in labels:
        for name in [label] if isinstance(label, str) else label:
            found[name] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def report(found: dict[str, dict[str, int]]) -> dict[str, Any]:
    """For the report: `labels`, the commonest of each part with their rows, and `warnings` of classes without any."""
    shown = {name: dict(list(part.items())[:SHOWN_CLASSES]) for name, part in found.items()}
    return {"labels": shown, "warnings": [text for name, part in found.items() for text in _absent(name, part)]}


def _absent(part: str, rows: dict[str, int]) -> list[str]:
    absent = [name for name, count in rows.items() if not count]
    if not absent:
        return []
    shown = ", ".join(map(repr, absent[:5])) + (", ..." if len(absent) > 5 else "")
    what = "cannot be learned" if part == TRAINING else "are not measured"
    return [f"{part}: {len(absent)} of {len(rows)} classes have no row and {what}: {shown}"]
