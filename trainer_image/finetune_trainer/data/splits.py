"""Which rows are trained on and which are held out: a pure function of the rows and the seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.rows import SOURCE, open_rows
from finetune_trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TRAINING, VALIDATION = "training", "validation"
"""The parts of a dataset, and the names of their files."""


def held_out(sources: NDArray[np.int64], fraction: float, seed: int) -> list[int]:
    """The source rows to hold out, in order: round(fraction * rows), but at least one and not all.

    Whole source rows, so that no part of a split text is trained on while another is held out.

    Raises:
        DataError: there is only one row.
    """
    rows = sorted({int(source) for source in sources})
    if len(rows) < 2:
        raise DataError(
            "dataset.validation.fraction: the dataset has one usable row, which cannot be both trained on and held out",
            "add rows, or remove dataset.validation",
        )
    count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    return sorted(random.Random(seed).sample(rows, count))


def source_column(rows: Dataset) -> NDArray[np.int64]:
    """The source row of every row, from the file as it was written."""
    return rows.data.column(SOURCE).to_numpy()


def split(folder: Path, sources_held_out: list[int]) -> dict[str, Dataset]:
    """The parts of what was encoded into a folder: two files, or one of which some rows are held out."""
    rows = open_rows(folder / f"{TRAINING}.arrow")
    others = folder / f"{VALIDATION}.arrow"
    if others.exists():
        return {TRAINING: rows, VALIDATION: open_rows(others)}
    if not sources_held_out:
        return {TRAINING: rows}
    held = np.isin(source_column(rows), sources_held_out)
    return {TRAINING: rows.select(np.flatnonzero(~held)), VALIDATION: rows.select(np.flatnonzero(held))}
