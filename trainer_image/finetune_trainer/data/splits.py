"""Which rows are trained on and which are held out: a pure function of the rows and the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
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
    rows = np.unique(sources).tolist()
    return sorted(random.Random(seed).sample(rows, _share(len(rows), fraction)))


def held_out_evenly(sources: NDArray[np.int64], classes: Sequence[Hashable], fraction: float, seed: int) -> list[int]:
    """The same share of every class, as nearly as whole rows allow; of each class at least one row is trained on.

    Args:
        sources: each row's number, without repetition.
        classes: of each row.

    Raises:
        DataError: there is only one row, or one of each class.
    """
    count, rng = _share(len(sources), fraction), random.Random(seed)
    groups: dict[Hashable, list[int]] = {}
    for source, group in zip(sources, classes, strict=True):
        groups.setdefault(group, []).append(int(source))
    # The n-th row of a class of c is due at about n/c of all; those that are due first are held out.
    due = []
    for group in sorted(groups, key=str):
        rows = rng.sample(groups[group], len(groups[group]))
        due += [((place + rng.random()) / len(rows), row) for place, row in enumerate(rows[:-1])]
    if not due:
        raise DataError(
            "dataset.validation.fraction: every class has a single row, which cannot be both trained on and held out",
            "add rows, or remove dataset.validation",
        )
    return sorted(row for _, row in sorted(due)[:count])


def _share(rows: int, fraction: float) -> int:
    if rows < 2:
        raise DataError(
            "dataset.validation.fraction: the dataset has one usable row, which cannot be both trained on and held out",
            "add rows, or remove dataset.validation",
        )
    return min(max(round(fraction * rows), 1), rows - 1)


def source_column(rows: Dataset) -> NDArray[np.int64]:
    """The source row of every row, from the file as it was written."""
    return rows.data.column(SOURCE).to_numpy()


def split(
    folder: Path, sources_held_out: list[int], opened: Callable[[Path], Dataset] = open_rows
) -> dict[str, Dataset]:
    """The parts of what was encoded into a folder; of the training rows some may be held out."""
    paths = {part: folder / f"{part}.arrow" for part in (TRAINING, VALIDATION)}
    parts = {part: opened(path) for part, path in paths.items() if path.exists()}
    if not sources_held_out:
        return parts
    rows = parts[TRAINING]
    held = np.isin(source_column(rows), sources_held_out)
    return {TRAINING: rows.select(np.flatnonzero(~held)), VALIDATION: rows.select(np.flatnonzero(held))}
