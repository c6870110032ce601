"""What training needs of the data, whatever is learned from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import IterableDataset


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready for the trainer.

    Attributes:
        train: rows; a stream has no length.
        validation: held-out rows, if there are any.
        report: counts, warnings and whatever shows people how the data was understood, as JSON.
    """

    train: Dataset | IterableDataset[Any]
    validation: Dataset | None
    report: dict[str, Any]
