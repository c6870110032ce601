"""What people write, judged before it is sent: the API server's checks, and the nearest name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from finetune_api.contract import GROUP, VERSION
from finetune_api.crd import job_schema
from finetune_api.schema import Schema
from finetune_operator.validation.admission import completed, problems_of
from finetune_operator.validation.defaulting import child_schema, unknown_fields
from finetune_operator.validation.problems import Problem, Steps, path_of, shown
from finetune_operator.validation.values import check

KIND = "FineTuneJob"
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA: Schema = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in ("name", "generateName", "namespace", "uid", "resourceVersion")},
        **{name: {"type": "string"} for name in ("creationTimestamp", "deletionTimestamp", "selfLink")},
        **{name: {"type": "integer"} for name in ("generation", "deletionGracePeriodSeconds")},
        **dict.fromkeys(("labels", "annotations"), TEXTS),
        **{name: {"type": "array"} for name in ("finalizers", "ownerReferences", "managedFields")},
    },
}
"""What every object may say of itself; the CRD cannot."""


def validate(data: Mapping[str, Any], node: yaml.Node | None = None) -> list[Problem]:
    """All that an API server would have against a new FineTuneJob, in the order of its lines.

    Args:
        data: the document.
        node: the same as PyYAML composed it, for lines and for keys that stand twice; None: no lines are known.
    """
    found = [*_identity(data), *_unknown(data), *_written_twice(node, ())]
    if isinstance(data.get("metadata"), dict):
        found += [*check(data["metadata"], METADATA, ("metadata",)), *problems_of(completed(_named(data)))]
    # Both the schema and what we know of metadata speak of its name.
    placed = [problem.at(line_of(node, problem.steps)) for problem in dict.fromkeys(found)]
    return sorted(placed, key=lambda problem: problem.line or 0)


def validate_update(old: Mapping[str, Any], new: Mapping[str, Any], node: yaml.Node | None = None) -> list[Problem]:
    """All that an API server would have against a change of a stored FineTuneJob."""
    found = [*_identity(new), *_unknown(new), *problems_of(completed(new), completed(old))]
    return [problem.at(line_of(node, problem.steps)) for problem in found]


def line_of(node: yaml.Node | None, steps: Steps) -> int | None:
    """The line, from 1, of a value's name, or of the nearest thing above it that is there."""
    line = None if node is None else node.start_mark.line + 1
    for step in steps:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in reversed(node.value) if pair[0].value == step), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line


def _named(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """With a name such as the server makes from generateName; what is missing altogether was told already."""
    metadata = data["metadata"]
    if metadata.get("name"):
        return data
    return {**data, "metadata": {**metadata, "name": f"{metadata.get('generateName') or 'name'}00000"}}


def _identity(data: Mapping[str, Any]) -> Iterator[Problem]:
    for name, wanted in (("apiVersion", f"{GROUP}/{VERSION}"), ("kind", KIND)):
        if data.get(name) != wanted:
            yield Problem((name,), f"Unsupported value: {shown(data.get(name))}: set {name} to {wanted}")
    metadata = data.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        yield Problem(("metadata", "name"), "Required value: name or generateName is required")


def _unknown(data: Mapping[str, Any]) -> Iterator[Problem]:
    schema = job_schema()
    whole = {**schema, "properties": {**schema["properties"], "metadata": METADATA}}
    for steps in unknown_fields(dict(data), whole):
        yield Problem(steps, f'unknown field "{path_of(steps)}"{_hint(steps, whole)}')


def _hint(steps: Steps, schema: Schema) -> str:
    """The nearest name at that place, the same name at another place, or all names there are."""
    name, known = str(steps[-1]), _names_at(steps[:-1], schema)
    by_letters = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower().replace("_", ""), by_letters, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {by_letters[near[0]]}?"
    elsewhere = [path_of(found) for found in _places(schema) if str(found[-1]).lower() == name.lower().replace("_", "")]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return f"; there are {', '.join(sorted(known))}" if known else ""


def _names_at(steps: Steps, schema: Schema) -> list[str]:
    for step in steps:
        schema = schema.get("items", {}) if isinstance(step, int) else child_schema(schema, step) or {}
    return list(schema.get("properties", {}))


def _places(schema: Schema, steps: Steps = ()) -> Iterator[Steps]:
    """All fields that a user may set, the upper ones first."""
    children = {name: child for name, child in schema.get("properties", {}).items() if steps or name == "spec"}
    yield from ((*steps, name) for name in children)
    for name, child in children.items():
        yield from _places(child, (*steps, name))


def _written_twice(node: yaml.Node | None, steps: Steps) -> Iterator[Problem]:
    """YAML takes the last one without a word, and the other is lost."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield Problem((*steps, key.value), f'key "{key.value}" is set twice; remove one of them')
            seen.add(key.value)
            yield from _written_twice(value, (*steps, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _written_twice(item, (*steps, index))
