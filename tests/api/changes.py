"""Changes to a stored job: every field of the spec changed, removed and added, and the few that may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.crd import job_schema
from finetune_api.schema import Schema
from finetune_operator.validation import validate
from tests.api.jobs import FULLS, REMOVED, changed
from tests.api.sensible import Object

MUTABLE = (
    *("spec.suspend", "spec.checkpoint.keep", "spec.runPolicy.retries", "spec.runPolicy.preflight"),
    *("spec.runPolicy.activeDeadlineSeconds", "spec.runPolicy.startDeadlineSeconds"),
    *("spec.runPolicy.ttlSecondsAfterFinished", "spec.runPolicy.stallTimeoutSeconds"),
)
SPEC = job_schema()["properties"]["spec"]
Field = tuple[str, Any, Schema]
"""Path, value, schema."""


@dataclass(frozen=True)
class Change:
    """An update, and whether it must be refused."""

    name: str
    before: Object
    after: Object
    refused: bool


def _changes() -> Iterator[Change]:
    seen: set[str] = set()
    for job in FULLS.values():
        yield from _of(job, seen)
    yield from _swaps(FULLS["QLoRA of Instruction"])
    yield from _orders(FULLS["LoRA of SequenceClassification"])


def _of(job: Object, seen: set[str]) -> Iterator[Change]:
    """Changes of every field, those apart that another job has shown: to judge them takes time."""
    spec = job["spec"]
    for path, value, schema in _new(leaves(spec, SPEC, "spec"), seen, "change"):
        if (other := _another(value, schema)) is not None:
            yield Change(f"change {path}", job, changed(job, {path: other}), _is_fixed(path))
    for path, value, schema in _new(_optional(spec, SPEC, "spec"), seen, "remove"):
        without = changed(job, {path: REMOVED})
        # Where a field has its default, it makes no difference whether it is written.
        refused = _is_fixed(path) and schema.get("default") != value
        yield Change(f"remove {path}", job, without, refused)
        if not validate(without):
            yield Change(f"add {path}", without, job, refused)


def _new(fields: Iterator[Field], seen: set[str], what: str) -> Iterator[Field]:
    for field in fields:
        if (name := f"{what} {field[0]}") not in seen:
            seen.add(name)
            yield field


def _swaps(job: Object) -> Iterator[Change]:
    """Other fields with the same values: the server once took them for equal, where no schema knew the fields."""
    cached = changed(job, {"spec.podTemplate.volumes[0]": {"name": "cache", "emptyDir": {}}})
    claimed = {"name": "cache", "persistentVolumeClaim": {"claimName": "other"}}
    yield Change("swap a volume's source", cached, changed(job, {"spec.podTemplate.volumes[0]": claimed}), True)
    nodes = job["spec"]["scheduling"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    wish = [{"weight": 1, "preference": nodes["nodeSelectorTerms"][0]}]
    other = {"preferredDuringSchedulingIgnoredDuringExecution": wish}
    yield Change("swap an affinity", job, changed(job, {"spec.scheduling.affinity.nodeAffinity": other}), True)


def _orders(job: Object) -> Iterator[Change]:
    """The server compares sets without their order, and that of the classes is the order of the model's outputs."""
    turned = list(reversed(job["spec"]["task"]["labels"]))
    yield Change("turn the classes round", job, changed(job, {"spec.task.labels": turned}), True)


def _is_fixed(path: str) -> bool:
    return not path.startswith(MUTABLE)


def leaves(value: Any, schema: Schema, path: str) -> Iterator[tuple[str, Any, Schema]]:
    """Everything in a value that is no object or list, by its path."""
    if isinstance(value, dict):
        for name, item in value.items():
            child = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            yield from leaves(item, child, f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, schema["items"], f"{path}[{index}]")
    else:
        yield path, value, schema


def _optional(value: Any, schema: Schema, path: str) -> Iterator[tuple[str, Any, Schema]]:
    """Every field in a value that need not be there."""
    if isinstance(value, dict):
        for name, item in value.items():
            child = schema.get("properties", {}).get(name)
            if child is not None and name not in schema.get("required", []):
                yield f"{path}.{name}", item, child
            if child is not None:
                yield from _optional(item, child, f"{path}.{name}")


def _another(value: Any, schema: Schema) -> Any:
    """Another value of the same type within its bounds; None where there is none."""
    if isinstance(value, bool):
        return not value
    if "enum" in schema:
        return next((other for other in schema["enum"] if other != value), None)
    if isinstance(value, int):
        return value + 1 if value < schema.get("maximum", value + 1) else value - 1
    return value / 2 if isinstance(value, float) else f"{value}x"


CHANGES = tuple(_changes())
