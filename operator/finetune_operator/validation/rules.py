"""CEL rules of the schema, evaluated here as the API server does it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import cel

from finetune_api.schema import LIST_KEYS, LIST_TYPE, RULES, Schema
from finetune_operator.validation.problems import Problem, Steps, shown

ABSENT: Any = object()
KINDS = {"FieldValueForbidden": "Forbidden", "FieldValueRequired": "Required value"}
"""The server's word for a rule's reason; without a reason a value is invalid."""


def check_rules(value: Any, schema: Schema, old: Any = ABSENT, steps: Steps = ()) -> Iterator[Problem]:
    """All rules that a value breaks; those about oldSelf are asked only where there is an old value."""
    for rule in schema.get(RULES, []):
        if (not is_transition(rule["rule"]) or old is not ABSENT) and not _holds(rule["rule"], value, old, schema):
            yield _refusal(rule, value, steps)
    if isinstance(value, dict):
        for name, item in value.items():
            child = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if child is not None:
                earlier = old.get(name, ABSENT) if isinstance(old, dict) else ABSENT
                yield from check_rules(item, child, earlier, (*steps, name))
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from check_rules(item, schema["items"], _counterpart(item, old, schema), (*steps, index))


def is_transition(rule: str) -> bool:
    """Whether a rule compares with the object before an update."""
    return re.search(r"\boldSelf\b", rule) is not None


def _counterpart(item: Any, old: Any, schema: Schema) -> Any:
    """The item of the old list with the same keys: only in lists that are maps can the two be told to be one."""
    if schema.get(LIST_TYPE) != "map" or not isinstance(old, list):
        return ABSENT
    keys = schema[LIST_KEYS]
    return next((other for other in old if all(other.get(key) == item.get(key) for key in keys)), ABSENT)


def _refusal(rule: dict[str, str], value: Any, steps: Steps) -> Problem:
    where = (*steps, *(step for step in rule.get("fieldPath", "").split(".") if step))
    if (kind := KINDS.get(rule.get("reason", ""))) is not None:
        return Problem(where, f"{kind}: {rule['message']}")
    # The server quotes what stands at the rule itself, and nothing longer than a scalar.
    quoted = "" if isinstance(value, dict | list) else f"{shown(value)}: "
    return Problem(where, f"Invalid value: {quoted}{rule['message']}")


def _holds(rule: str, value: Any, old: Any, schema: Schema) -> bool:
    names = {"self": typed(value, schema)}
    if old is not ABSENT:
        names["oldSelf"] = typed(old, schema)
    return bool(_program(rule).execute(names))


@cache
def _program(rule: str) -> cel.Program:
    return cel.compile(rule)


def typed(value: Any, schema: Schema) -> Any:
    """A value with CEL's types: there 1 is no double and 1.0 no int, in JSON both are numbers."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return {
            name: typed(item, known.get(name, schema.get("additionalProperties", {}))) for name, item in value.items()
        }
    if isinstance(value, list):
        return [typed(item, schema.get("items", {})) for item in value]
    kind = schema.get("type")
    return float(value) if kind == "number" else int(value) if kind == "integer" else value
