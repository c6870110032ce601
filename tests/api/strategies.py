"""Random FineTuneJobs that are valid by construction."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from finetune_api.crd import job_schema
from finetune_api.pairs import ALLOWED
from finetune_api.schema import RULES, Schema
from tests.api.jobs import FULLS, changed, full, minimal
from tests.api.sensible import Object, sensible

SPEC = job_schema()["properties"]["spec"]
EXAMPLES = [
    *(full(strategy.value, task.value)["spec"] for strategy, task in ALLOWED),
    *(job["spec"] for job in FULLS.values()),
]
FORMATS = {
    "Instruction": ["auto", "messages", "sharegpt", "alpaca", "prompt-completion"],
    "CausalLM": ["auto", "text"],
    "SequenceClassification": ["auto", "labeled"],
    "Regression": ["auto", "labeled"],
    "ImageClassification": ["auto", "labeled", "image-folder"],
}


def _only(spec: Object) -> dict[str, list[Any]]:
    """Values that are supported where the schema has more, or that make the job one of this strategy and task."""
    return {
        "spec.strategy.type": [spec["strategy"]["type"]],
        "spec.task.type": [spec["task"]["type"]],
        "spec.dataset.format": FORMATS[spec["task"]["type"]],
    }


def _numbers(schema: Schema) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer":
        return st.integers(low, high)
    return st.floats(
        *(None if bound is None else float(bound) for bound in (low, high)),
        exclude_min=bool(schema.get("exclusiveMinimum")),
        exclude_max=bool(schema.get("exclusiveMaximum")),
        allow_nan=False,
        allow_infinity=False,
    )


def _values(schema: Schema, example: Any, path: str, only: dict[str, list[Any]]) -> st.SearchStrategy[Any]:
    """Values of a field; texts and lists are those of the example, since rules say how they look."""
    if path in only:
        return st.sampled_from(only[path])
    if isinstance(example, dict) and "properties" in schema:
        return _objects(schema, example, path, only)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("type") in ("integer", "number"):
        return _numbers(schema)
    return st.booleans() if schema.get("type") == "boolean" else st.just(example)


def _objects(schema: Schema, example: Object, path: str, only: dict[str, list[Any]]) -> st.SearchStrategy[Object]:
    known = {name: schema["properties"][name] for name in example}
    fields = {name: _values(child, example[name], f"{path}.{name}", only) for name, child in known.items()}
    required = schema.get("required", [])
    return st.fixed_dictionaries(
        {name: field for name, field in fields.items() if name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )


def jobs() -> st.SearchStrategy[Object]:
    """Valid jobs of all strategies and tasks, from nearly minimal to nearly full."""
    return st.sampled_from(EXAMPLES).flatmap(_like)


def _like(example: Object) -> st.SearchStrategy[Object]:
    values = _objects(SPEC, example, "spec", _only(example))
    return values.map(lambda spec: changed(minimal(), {"spec": sensible(copy.deepcopy(spec))}))


def unsupported(schema: Schema) -> bool:
    return any(rule["rule"] == "false" for rule in schema.get(RULES, []))
