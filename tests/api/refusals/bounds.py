"""Every bound of the schema, overstepped by as little as can be; the words are those of Kubernetes 1.36.

What lies beyond a bound may break a rule too, so that these are perhaps not the only words about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.crd import job_schema
from finetune_api.schema import INT_OR_STRING, Schema
from tests.api.jobs import FULLS, REMOVED
from tests.api.refusals.refusal import Refusal, quoted

SPEC = job_schema()["properties"]["spec"]
LARGE = {1_000_000: "1e+06", 1_000_000.5: "1.0000005e+06"}
"""How the server, which is written in Go, quotes large numbers that are no integers by their type."""
Case = tuple[str, Any, str]
"""What is done, the value that does it, and the words about it after `path: `."""


def _all() -> Iterator[Refusal]:
    seen: set[str] = set()
    for job in FULLS.values():
        for path, schema, required in _nodes(job["spec"], SPEC, "spec"):
            cases = [*_cases(path, schema), *([("left out", REMOVED, "Required value")] if required else [])]
            for what, value, words in cases:
                name = f"{path} {what}"
                if name not in seen:
                    seen.add(name)
                    yield Refusal(name, {path: value}, f"{path}: {words}", job)


def _nodes(value: Any, schema: Schema, path: str, required: bool = False) -> Iterator[tuple[str, Schema, bool]]:
    """Everything in a value, by its path, with its schema and whether it must be there."""
    yield path, schema, required
    if isinstance(value, dict):
        for name, item in value.items():
            child = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            yield from _nodes(item, child, f"{path}.{name}", name in schema.get("required", []))
    elif isinstance(value, list):
        yield from _nodes(value[0], schema["items"], f"{path}[0]")


def _cases(path: str, schema: Schema) -> Iterator[Case]:
    kind = "string" if schema.get(INT_OR_STRING) else schema.get("type")
    if "enum" in schema:
        supported = ", ".join(map(quoted, schema["enum"]))
        yield "of another kind", "Other", f'Unsupported value: "Other": supported values: {supported}'
    elif kind in ("integer", "number"):
        yield from _numbers(path, schema)
    elif kind == "string":
        yield from _strings(path, schema)
    elif kind == "array":
        yield from _lists(path, schema)
    elif "maxProperties" in schema:
        many = schema["maxProperties"] + 1
        values = {f"k{number}": 1 if _holds_numbers(schema) else "x" for number in range(many)}
        yield "with too many keys", values, f"Too many: {many}: must have at most {many - 1} items"


def _holds_numbers(schema: Schema) -> bool:
    return bool(schema["additionalProperties"]["type"] == "integer")


def _numbers(path: str, schema: Schema) -> Iterator[Case]:
    step = 1 if schema["type"] == "integer" else 0.5
    for side, way, word, what in (("minimum", -1, "greater", "too small"), ("maximum", 1, "less", "too large")):
        if side not in schema:
            continue
        bound = schema[side]
        exclusive = schema.get(f"exclusive{side.title()}", False)
        value = bound if exclusive else bound + way * step
        words = f"{word} than" if exclusive else f"{word} than or equal to"
        large = {} if schema["type"] == "integer" else LARGE
        said = f"{path} in body should be {words} {large.get(bound, bound)}"
        yield what, value, f"Invalid value: {large.get(value, value)}: {said}"


def _strings(path: str, schema: Schema) -> Iterator[Case]:
    longest = schema["maxLength"]
    yield "too long", "x" * (longest + 1), f"Too long: may not be more than {longest} bytes"
    if shortest := schema.get("minLength"):
        yield "too short", "", _in_body(path, "", f"be at least {shortest} chars long")


def _lists(path: str, schema: Schema) -> Iterator[Case]:
    if few := schema.get("minItems"):
        yield "with too few", _items(schema, few - 1), _in_body(path, few - 1, f"have at least {few} items")
    many = schema["maxItems"] + 1
    # Where there are no more values than places, the list cannot be too long without saying one twice.
    if len(schema["items"].get("enum", range(many))) >= many:
        yield "with too many", _items(schema, many), f"Too many: {many}: must have at most {many - 1} items"


def _items(schema: Schema, number: int) -> list[Any]:
    """So many items, no two of them equal where that would be told too."""
    kind = schema["items"].get("type")
    return [index if kind == "integer" else _object(schema["items"], index) for index in range(number)]


def _object(schema: Schema, index: int) -> Any:
    if "properties" not in schema:
        return f"x{index}"
    required = {name: schema["properties"][name] for name in schema.get("required", [])}
    return {name: 1 if "minimum" in child else _object(child, index) for name, child in required.items()}


def _in_body(path: str, value: Any, should: str) -> str:
    return f"Invalid value: {quoted(value)}: {path} in body should {should}"


BY_BOUND = tuple(_all())
