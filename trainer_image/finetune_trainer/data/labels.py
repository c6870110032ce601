"""Labels as they stand in rows -> names of classes or numbers, and the order of the classes."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from finetune_api.task import TaskSpec, TaskType
from finetune_trainer.data.problems import RowError, kind, shorten
from finetune_trainer.data.values import checked_text, listed
from finetune_trainer.errors import DataError

MAX_CLASSES = 4096
"""As many as task.labels may name."""
MAX_NAME = 128
WHOLE = re.compile(r"[+-]?\d+")


class Labels(ABC):
    """How labels are read; can be pickled."""

    kind: pa.DataType
    """Of the column that holds what is read."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """The label of a row; raises RowError."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes, where they are known before the rows are."""
        return None

    def among(self, classes: tuple[str, ...]) -> Labels:
        """The same for rows that are held out: only what is learned can be asked."""
        return self


@dataclass(frozen=True)
class ClassLabel(Labels):
    """One class: its name, or with task.labels its number from 0.

    Numbers in the data are names ("1", "2") unless task.labels gives names, none of which is a whole number itself.
    """

    known: tuple[str, ...] | None = None
    whose: str = "task.labels"
    kind = pa.string()

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.known

    def among(self, classes: tuple[str, ...]) -> ClassLabel:
        return self if self.known else replace(self, known=classes, whose="the labels of the training rows")

    def read(self, value: Any) -> str:
        if isinstance(listed(value), list | dict):
            raise RowError(f"label is {kind(listed(value))}; for several classes set task.multiLabel to true")
        return self.class_of(value)

    def class_of(self, value: Any) -> str:
        name = _name(value)
        if self.known is None or name in self.known:
            return name
        if WHOLE.fullmatch(name) and self._by_number:
            return self._numbered(int(name))
        near = get_close_matches(name, self.known, n=3, cutoff=0.5) or self.known[:8]
        nearest = ", ".join(map(repr, near))
        raise RowError(f"label {shorten(name, 80)!r} is none of {self.whose}; near it: {nearest}")

    @property
    def _by_number(self) -> bool:
        return self.whose == "task.labels" and not any(WHOLE.fullmatch(name) for name in self.known or ())

    def _numbered(self, number: int) -> str:
        assert self.known is not None
        if not 0 <= number < len(self.known):
            raise RowError(f"label is the number {number}, but task.labels are 0 to {len(self.known) - 1}")
        return self.known[number]


@dataclass(frozen=True)
class ClassLabels(ClassLabel):
    """Any number of classes: a list of names or numbers, in a CSV column as JSON text."""

    kind = pa.list_(pa.string())

    def read(self, value: Any) -> list[str]:
        value = listed(value)
        if not isinstance(value, list):
            raise RowError(
                f'label is {kind(value)}; with task.multiLabel it must be a list, such as ["sport"], or [] for no class'
            )
        names = [self.class_of(item) for item in value]
        if len(set(names)) < len(names):
            raise RowError(f"label names a class twice: {shorten(str(names), 120)}; it lists the classes of the row")
        return names


@dataclass(frozen=True)
class Numbers(Labels):
    """A number, in a CSV column as text."""

    kind = pa.float64()

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise RowError(f"label is {kind(value)}; task Regression learns numbers")
        try:
            number = float(value)
        except ValueError:
            raise RowError(f"label is {shorten(str(value), 80)!r}; task Regression learns numbers") from None
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise RowError(f"label is {number}; it must be a finite number")
        return number


def labels_of(task: TaskSpec) -> Labels:
    """How a task's labels are read."""
    if task.type is TaskType.REGRESSION:
        return Numbers()
    known = tuple(task.labels) if task.labels else None
    return ClassLabels(known) if task.multi_label else ClassLabel(known)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """The classes of a dataset in the order of the model's outputs: whole numbers by their size, else by their names.

    Raises:
        DataError: there is nothing to tell apart, or far too much.
    """
    found = set(names)
    if len(found) < 2:
        only = f"there is one class, {next(iter(found))!r}" if found else "no row has a class"
        raise DataError(
            f"the training rows have nothing to tell apart: {only}",
            "add rows of other classes, or name in dataset.columns the column that holds the labels",
        )
    if len(found) > MAX_CLASSES:
        raise DataError(
            f"the training rows have {len(found)} different labels; at most {MAX_CLASSES} can be told apart",
            "for numbers set task.type to Regression; else name in dataset.columns the column that holds the labels",
        )
    if all(WHOLE.fullmatch(name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise RowError(f"label is the number {value}; for numbers set task.type to Regression")
    if isinstance(value, int):
        return str(value)
    name = checked_text(value, "label").strip()
    if not name:
        raise RowError("label is empty")
    if len(name) > MAX_NAME:
        raise RowError(f"label has {len(name)} characters; the name of a class has at most {MAX_NAME}")
    return name
