"""dataset.columns: the data's own names of fields, put into the names that the formats read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from finetune_api.job import DatasetFormat, DatasetSpec, TaskType
from finetune_trainer.data.formats import FORMATS, Format
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Row
from finetune_trainer.errors import UsageError

Columns = Mapping[str, str]
"""Name of a format's field -> name in the data."""


def check_columns(spec: DatasetSpec, task: TaskType) -> None:
    """Refuse a mapping to a field that nothing would read.

    Raises:
        UsageError: names the field, and the fields that the formats in question read.
    """
    formats = _formats(spec, task)
    readable = {field for item in formats for field in item.reads}
    whose = f"a format of task {task.value}" if spec.format is DatasetFormat.AUTO else f"format {spec.format.value}"
    for field, name in spec.columns.items():
        if field not in readable:
            raise UsageError(
                f"spec.dataset.columns: {field} (mapped to {name!r}) is no field of {whose}",
                f"map one of the fields that are read: {_listed(formats)}",
            )


def renamed(item: Row | Problem, columns: Columns) -> Row | Problem:
    """The row with its mapped fields under the names of the format; its other fields stay as they are."""
    if isinstance(item, Problem) or not columns:
        return item
    for field, name in columns.items():
        if name not in item.value:
            found = ", ".join(map(str, item.value)) or "none"
            reason = f"{name!r}, which dataset.columns maps to {field}, is missing; the fields here are {found}"
            return Problem(item.file, item.line, reason)
    taken = set(columns.values())
    rest = {name: value for name, value in item.value.items() if name not in taken}
    return Row(item.file, item.line, rest | {field: item.value[name] for field, name in columns.items()})


def _formats(spec: DatasetSpec, task: TaskType) -> list[Format]:
    if spec.format is not DatasetFormat.AUTO:
        return [FORMATS[spec.format.value]]
    return [item for item in FORMATS.values() if task in item.tasks]


def _listed(formats: Iterable[Format]) -> str:
    return "; ".join(f"{item.name} ({', '.join(item.reads)})" for item in formats)
