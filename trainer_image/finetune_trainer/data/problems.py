"""Rows that cannot be used: collected while reading, and told together in one error."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_trainer.errors import DataError

KEPT = 20
"""Problems kept in full; of the others only the count, so that a dataset of nothing but wrong rows stays small."""
NAMED = 3
"""Further rows named after the first in an error message; the termination message has room for 4 KiB."""
REASON_CHARACTERS = 400
"""A reason may quote the data: what is longer than this is cut."""


class RowError(ValueError):
    """A row that cannot be used; its message names the field, what it is and what it must be."""


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. `line` is 1-based (for parquet the row's number), 0 where the whole file is meant."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {shorten(self.reason)}"


@dataclass
class Problems:
    """The problems of one dataset, in the order of its rows."""

    count: int = 0
    first: list[Problem] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)

    def add(self, problem: Problem) -> None:
        self.count += 1
        self.files[problem.file] += 1
        if len(self.first) < KEPT:
            self.first.append(problem)

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"count": self.count, "first": [asdict(item) for item in self.first], "files": dict(self.files)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Problems:
        """From a state."""
        return cls(state["count"], [Problem(**problem) for problem in state["first"]], Counter(state["files"]))

    def error(self, advice: str) -> DataError:
        """The first problem in detail, the next ones named, the rest counted."""
        return DataError(str(self.first[0]) + self._others(), advice)

    def _others(self) -> str:
        if self.count == 1:
            return ""
        rest = self.count - 1
        named = "; ".join(str(problem) for problem in self.first[1 : 1 + NAMED])
        unnamed = rest - min(rest, NAMED)
        tail = f"; and {unnamed} more" if unnamed else ""
        return f" ({rest} more {'row' if rest == 1 else 'rows'} cannot be used: {named}{tail})"

    def report(self) -> dict[str, Any]:
        """For the report: how many, in which files, and the first ones in words."""
        return {"count": self.count, "files": dict(self.files), "first": [str(problem) for problem in self.first]}


def shorten(text: str, limit: int = REASON_CHARACTERS) -> str:
    """Cut a text in the middle, where it tells least."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def kind(value: object) -> str:
    """A value's type, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
