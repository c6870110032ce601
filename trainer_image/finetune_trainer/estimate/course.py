"""How memory goes up and down within a step, and its highest point with all that FSDP gathers on the way. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from finetune_trainer.estimate.figures import FLOAT, ROOT, Held

FORWARD, END = "forward", "end"


class Point(NamedTuple):
    """A moment of the step.

    Attributes:
        activations: most bytes of them since the point before.
        made: elements of gradients that were there by then.
        where: the parameter whose gradient was made then; FORWARD when the loss was there, END after all of them.
    """

    activations: int
    made: int
    where: str


Course = tuple[Point, ...]


class Highest(NamedTuple):
    """What is held at the step's highest point beside parameters, moments and all gradients, bytes."""

    activations: int
    temporary: int


def highest(
    course: Course, buffers: Callable[[Point], int], bytes_per_gradient: float, *, accumulates: bool
) -> Highest:
    """The highest point of the step.

    Args:
        buffers: what is held at a point beside activations and gradients, bytes.
        bytes_per_gradient: of one element on this rank: 4, over the ranks where they are sharded.
        accumulates: whether gradients of an earlier micro-step lie there from the start.
    """
    every = round(max(point.made for point in course) * bytes_per_gradient)

    def size(point: Point) -> int:
        gradients = every if accumulates else round(point.made * bytes_per_gradient)
        return point.activations + buffers(point) + gradients

    top = max(course, key=size)
    # Not all gradients are there yet, and they are counted apart.
    beside = size(top) - every
    temporary = min(buffers(top), beside)
    return Highest(beside - temporary, temporary)


@dataclass(frozen=True)
class Gathering:
    """What FSDP2 gathers and reduces, from point to point.

    Attributes:
        units: the unit of each parameter, by its name.
        whole, learning: elements of each unit, and those of them that learn.
        itemsize: of what is gathered, bytes.
        stays: whether blocks stay gathered from their forward to their backward pass.
    """

    units: dict[str, str]
    whole: dict[str, int]
    learning: dict[str, int]
    itemsize: int
    stays: bool = False

    @classmethod
    def of(cls, held: Iterable[Held], itemsize: int, *, stays: bool = False) -> Gathering:
        """The gathering of a model's parameters."""
        units: dict[str, str] = {}
        whole: defaultdict[str, int] = defaultdict(int)
        learning: defaultdict[str, int] = defaultdict(int)
        for item in held:
            units[item.name] = item.unit
            whole[item.unit] += item.whole
            learning[item.unit] += item.whole if item.learns else 0
        return cls(units, whole, learning, itemsize, stays)

    def at(self, point: Point) -> int:
        """Bytes at a point.

        What lies outside of the blocks (embedding, head) stays gathered for the whole step, with its gradients, which
        are reduced at the end. Of the blocks one is in use, the next one is being prefetched, and its flat buffer is
        copied from; in the backward pass its gradients are put together and reduced in float32.
        """
        blocks = [size for unit, size in self.whole.items() if unit != ROOT]
        kept = (self.whole.get(ROOT, 0) + (sum(blocks) if self.stays else 0)) * self.itemsize
        largest = 0 if self.stays else max(blocks, default=0)
        if point.where == FORWARD:
            return kept + 3 * largest * self.itemsize
        outside = self.learning.get(ROOT, 0)
        unit = ROOT if point.where == END else self.units[point.where]
        if unit != ROOT:
            in_use = 0 if self.stays else 3 * self.whole[unit]
            reduced = self.learning[unit] * (self.itemsize + FLOAT)
            return kept + (outside + in_use) * self.itemsize + reduced
        if point.made < outside:
            # The loss and the head: the last block is on its way.
            return kept + largest * self.itemsize
        return kept + outside * (self.itemsize + FLOAT)
