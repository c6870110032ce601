"""What is wrong with a document, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

Steps = tuple[str | int, ...]
"""The way from the root of a document to a value: names and list indices."""


@dataclass(frozen=True)
class Problem:
    """One refusal. `message` is what the API server says of it, the path apart."""

    steps: Steps
    message: str
    line: int | None = None
    blocking: bool = False
    """The API server evaluates no CEL rules where one of these was found: rules may rely on the types."""

    @property
    def path(self) -> str:
        return path_of(self.steps)

    def at(self, line: int | None) -> Problem:
        return replace(self, line=line)

    def __str__(self) -> str:
        """`spec.strategy.type: Unsupported value: ...`; sentences about names bring their path along."""
        return self.message if self.message.startswith("unknown field") else f"{self.path}: {self.message}"


def path_of(steps: Iterable[str | int]) -> str:
    """`spec.env[0].name`."""
    found = ""
    for step in steps:
        found += f"[{step}]" if isinstance(step, int) else f".{step}" if found else step
    return found


def shown(value: Any) -> str:
    """A value as the API server quotes it."""
    if isinstance(value, float):
        return number(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def number(value: float) -> str:
    """As Go writes a float64: the fewest digits that name it, with an exponent below 1e-4 and from 1e6 on."""
    digits = Decimal(repr(value)).normalize()
    if value and not -4 <= digits.adjusted() < 6:
        return f"{value:.{len(digits.as_tuple().digits) - 1}e}"
    return str(int(value)) if value.is_integer() else repr(value)
