"""Types, bounds and enumerations, in the API server's words (those of Kubernetes 1.36)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.schema import INT_OR_STRING, LIST_KEYS, LIST_TYPE, Schema
from finetune_operator.validation.problems import Problem, Steps, path_of, shown

NAMES = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
"""Types of JSON by those of Python; bool first, since it is an int there."""


def check(value: Any, schema: Schema, steps: Steps = ()) -> Iterator[Problem]:
    """All that the schema has against a value, rules apart."""
    wanted = _wanted(schema)
    if wanted and type_name(value) not in wanted:
        yield _wrong_type(value, schema, steps)
        return
    yield from _enumeration(value, schema, steps)
    if isinstance(value, str):
        yield from _string(value, schema, steps)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(value, schema, steps)
    elif isinstance(value, list):
        yield from _list(value, schema, steps)
    elif isinstance(value, dict):
        yield from _object(value, schema, steps)


def type_name(value: Any) -> str:
    """JSON's word for a value's type; 3.0 is an integer there."""
    if isinstance(value, float) and value.is_integer():
        return "integer"
    return next((name for kind, name in NAMES if isinstance(value, kind)), "null")


def _wanted(schema: Schema) -> tuple[str, ...]:
    if schema.get(INT_OR_STRING):
        return ("integer", "string")
    kind = schema.get("type")
    return ("number", "integer") if kind == "number" else (kind,) if kind else ()


def _wrong_type(value: Any, schema: Schema, steps: Steps) -> Problem:
    got = type_name(value)
    want = "integer,string" if schema.get(INT_OR_STRING) else schema["type"]
    if want == "integer" and got == "number" and "format" in schema:
        want, got = schema["format"], "float64"
    return _invalid(got, f"must be of type {want}: {shown(got)}", steps, blocking=True)


def _invalid(value: Any, why: str, steps: Steps, blocking: bool = False) -> Problem:
    return Problem(steps, f"Invalid value: {shown(value)}: {path_of(steps)} in body {why}", blocking=blocking)


def _enumeration(value: Any, schema: Schema, steps: Steps) -> Iterator[Problem]:
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(shown(item) for item in schema["enum"])
        yield Problem(steps, f"Unsupported value: {shown(value)}: supported values: {supported}", blocking=True)


def _string(value: str, schema: Schema, steps: Steps) -> Iterator[Problem]:
    if len(value) > schema.get("maxLength", len(value)):
        yield Problem(steps, f"Too long: may not be more than {schema['maxLength']} bytes", blocking=True)
    if len(value) < schema.get("minLength", 0):
        yield _invalid(value, f"should be at least {schema['minLength']} chars long", steps)


def _number(value: float, schema: Schema, steps: Steps) -> Iterator[Problem]:
    low, high = (_bound(schema, side) for side in ("minimum", "maximum"))
    if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
        words = "greater than" if schema.get("exclusiveMinimum") else "greater than or equal to"
        yield _invalid(value, f"should be {words} {shown(low)}", steps)
    if high is not None and (value > high or (schema.get("exclusiveMaximum") and value == high)):
        words = "less than" if schema.get("exclusiveMaximum") else "less than or equal to"
        yield _invalid(value, f"should be {words} {shown(high)}", steps)


def _bound(schema: Schema, side: str) -> float | None:
    """A bound with the type of its field, which decides how it is quoted."""
    bound: float | None = schema.get(side)
    return float(bound) if bound is not None and schema.get("type") == "number" else bound


def _list(value: list[Any], schema: Schema, steps: Steps) -> Iterator[Problem]:
    if len(value) > schema.get("maxItems", len(value)):
        yield _too_many(value, schema["maxItems"], steps)
    if len(value) < schema.get("minItems", 0):
        why = f"should have at least {schema['minItems']} items"
        yield Problem(steps, f"Invalid value: {len(value)}: {path_of(steps)} in body {why}")
    for index, item in enumerate(value):
        yield from check(item, schema.get("items", {}), (*steps, index))
    yield from _duplicates(value, schema, steps)


def _duplicates(value: list[Any], schema: Schema, steps: Steps) -> Iterator[Problem]:
    """An item of a set, or the keys of an item of a map, may stand there once."""
    if schema.get(LIST_TYPE) not in ("set", "map"):
        return
    seen: list[Any] = []
    for index, item in enumerate(value):
        key = item
        if schema[LIST_TYPE] == "map" and isinstance(item, dict):
            key = {name: item[name] for name in schema[LIST_KEYS] if name in item}
        if key in seen:
            yield Problem((*steps, index), f"Duplicate value: {shown(key)}")
        seen.append(key)


def _object(value: dict[str, Any], schema: Schema, steps: Steps) -> Iterator[Problem]:
    for name in schema.get("required", []):
        if name not in value:
            yield Problem((*steps, name), "Required value", blocking=True)
    if len(value) > schema.get("maxProperties", len(value)):
        yield _too_many(value, schema["maxProperties"], steps)
    for name, item in value.items():
        child = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
        yield from check(item, child, (*steps, name))


def _too_many(value: Any, most: int, steps: Steps) -> Problem:
    return Problem(steps, f"Too many: {len(value)}: must have at most {most} items", blocking=True)
