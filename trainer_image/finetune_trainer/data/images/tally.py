"""What was found among the images of a part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.data.images.looking import Looked
from finetune_trainer.data.tally import Tally

Size = tuple[int, int]


@dataclass
class ImageTally(Tally):
    """Of images: the smallest and the largest of them too, as width and height.

    Attributes:
        ignored: names of files that are none.
        notes: what a user should know of where they lie.
    """

    smallest: Size | None = None
    largest: Size | None = None
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, result: Looked) -> None:
        super().count(result)
        self.smallest = min(self.smallest or result.size, result.size, key=_pixels)
        self.largest = max(self.largest or result.size, result.size, key=_pixels)

    def counts(self) -> dict[str, Any]:
        sizes = {"smallest": self.smallest, "largest": self.largest}
        return super().counts() | {
            "pixels": {name: f"{size[0]} x {size[1]}" for name, size in sizes.items() if size},
        }

    def state(self) -> dict[str, Any]:
        return super().state() | {"sizes": [self.smallest, self.largest]}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.smallest, self.largest = (tuple(size) if size else None for size in state["sizes"])

    def warnings(self, limit: str) -> list[str]:
        found = [*super().warnings(limit), *self.notes]
        if self.ignored:
            found.append(f"{len(self.ignored)} files are no images and were left out: {', '.join(self.ignored[:3])}")
        return found


def _pixels(size: Size) -> int:
    return size[0] * size[1]
