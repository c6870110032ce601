"""What all benchmarks share: pairs run in turns, medians, and one line of JSON for each figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int, prepare: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Run both in turns, in the order AB BA AB ..., so that what else happens on the machine hits both alike.

    `prepare` runs before each, untimed. Returns the figures of both sides, in pairs.
    """
    figures: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            prepare()
            figures[side].append((ours, theirs)[side]())
    return figures


def median(figures: Sequence[float]) -> float:
    return statistics.median(figures)


def report(name: str, **figures: object) -> None:
    """One line of JSON on standard output; floats with four digits."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"benchmark": name, **rounded}), flush=True)
