"""Fields of a row, taken out with a check; errors name the field, what it is and what it must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.problems import RowError, kind


def text_of(row: Mapping[str, Any], field: str, path: str = "") -> str:
    """The text in a field; `path` is how the message calls it, where it lies deeper in the row."""
    return checked_text(field_of(row, field, path), path or field)


def field_of(row: Mapping[str, Any], field: str, path: str = "") -> Any:
    """What is in a field, which must be there."""
    if field not in row:
        fields = ", ".join(str(key) for key in row) or "none"
        raise RowError(f"{path or field} is missing; the fields here are {fields}")
    return row[field]


def checked_text(value: Any, name: str) -> str:
    """A value that must be text; half a surrogate pair, which JSON can hold, is no text."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half a surrogate pair at character {error.start + 1}: no text") from error
    return value


def filled(value: Any) -> bool:
    """Whether an optional field says something: CSV and parquet have all columns in every row."""
    return value is not None and value not in ("", [])


def listed(value: Any) -> Any:
    """A list or object that was written as JSON text, as it must be in a CSV column; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
