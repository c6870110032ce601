"""What an API server does to an object before it validates it: unknown fields go, defaults come. Pure: copies."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from finetune_api.schema import PRESERVE, Schema
from finetune_operator.validation.problems import Steps

OF_THE_SERVER = ("apiVersion", "kind", "metadata")
"""Not a matter of the schema: it may only narrow the name."""


def prune(value: Any, schema: Schema) -> Any:
    """Without fields that the schema does not know, and without nulls where it allows none."""
    if isinstance(value, dict) and not schema.get(PRESERVE):
        found = ((name, item, child_schema(schema, name)) for name, item in named(value))
        return {name: prune(item, child) for name, item, child in found if child is not None and item is not None}
    if isinstance(value, list) and "items" in schema:
        return [prune(item, schema["items"]) for item in value]
    return copy.deepcopy(value)


def apply_defaults(value: Any, schema: Schema) -> Any:
    """With the schema's defaults where a field is absent, at every depth."""
    if isinstance(value, dict):
        added = {name: child["default"] for name, child in schema.get("properties", {}).items() if "default" in child}
        return {
            name: apply_defaults(item, child_schema(schema, name) or {})
            for name, item in {**value, **{name: item for name, item in added.items() if name not in value}}.items()
        }
    if isinstance(value, list) and "items" in schema:
        return [apply_defaults(item, schema["items"]) for item in value]
    return copy.deepcopy(value)


def unknown_fields(value: Any, schema: Schema, steps: Steps = ()) -> Iterator[Steps]:
    """Where pruning would take something away that was written."""
    if isinstance(value, dict) and not schema.get(PRESERVE):
        for name, item in named(value):
            child = child_schema(schema, name)
            if child is None:
                yield (*steps, name)
            else:
                yield from unknown_fields(item, child, (*steps, name))
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema["items"], (*steps, index))


def named(value: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Items by their names: YAML knows others than texts (`1: x`, `on: x`), JSON does not."""
    return ((name if isinstance(name, str) else json.dumps(name, default=str), item) for name, item in value.items())


def child_schema(schema: Schema, name: str) -> Schema | None:
    """The schema of a field or of a map's value; None: unknown."""
    found: Schema | None = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
    return {} if found is None and schema.get(PRESERVE) else found
