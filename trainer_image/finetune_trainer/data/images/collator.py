"""Images become what the model takes when a batch is made, in the dataloader's workers where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.data.images.decoding import decoded
from finetune_trainer.data.images.index import encoded
from finetune_trainer.data.problems import RowError
from finetune_trainer.errors import DataError


@dataclass(frozen=True)
class ImageCollator:
    """Rows of an index -> `pixel_values`, (rows, 3, height, width), and `labels`, (rows,).

    Attributes:
        processor: the model's own; it draws no random numbers, so that a batch is the same in whatever process.
    """

    processor: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises DataError when an image is no longer what it was when it was looked at."""
        pixels = self.processor([_image(row) for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def _image(row: dict[str, Any]) -> Any:
    try:
        return decoded(encoded(row))
    except RowError as error:
        place = f"{row['file']}:{row['line']}" if row["line"] else row["file"]
        raise DataError(f"{place}: {error}", "the file has changed since the run began; start it again") from error
