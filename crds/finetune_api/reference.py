"""docs/api.md: the reference of the API, written from the schema of the CRD. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetune_api.contract import GROUP, VERSION
from finetune_api.crd import JOB_COLUMNS, job_schema
from finetune_api.schema import INT_OR_STRING, LIST_KEYS, PRESERVE, RULES, Schema

HEAD = f"""# API reference

Generated from the types in `crds/finetune_api` by `make docs`; edit those.

`FineTuneJob` (`kubectl get ftj`), group `{GROUP}`, version `{VERSION}`. The name has at most 45 characters: small
letters, digits and `-`, beginning with a letter. After creation only `suspend`, `runPolicy` and `checkpoint.keep` of
`spec` can be changed.

**Required** fields have no default. A field without either is off, or decided by what its description says; members of
a union, such as `strategy.lora`, have their own defaults when they are absent. `finetune plan` shows a job with
everything filled in, `finetune validate` refuses what the API server would refuse, in the same words.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    schema = job_schema()
    parts = [HEAD, *_rules_about(schema, "The object"), *_columns()]
    for name in ("spec", "status"):
        parts += _section(name, schema["properties"][name])
    return "\n".join(parts).rstrip() + "\n"


def _columns() -> Iterator[str]:
    yield "## Columns of `kubectl get`\n"
    yield "| column | shown | what it is |\n|---|---|---|"
    for column in JOB_COLUMNS:
        shown = "with `-o wide`" if column.get("priority") else "always"
        yield f"| {column['name'].upper()} | {shown} | {_cell(column['description'])} |"
    yield ""


def _section(path: str, schema: Schema) -> Iterator[str]:
    """A table of one object's fields, its rules, and a section for each object in it."""
    yield f"## {path}\n"
    yield f"{schema.get('description', '')}\n"
    properties: dict[str, Schema] = schema.get("properties", {})
    yield "| field | type | default | description |\n|---|---|---|---|"
    for name, child in properties.items():
        required = name in schema.get("required", [])
        yield f"| `{name}` | {_type(child, f'{path}.{name}')} | {_default(child, required)} | {_description(child)} |"
    yield ""
    yield from _rules_about(schema, "Rules")
    for name, child in properties.items():
        found = _object_in(child, f"{path}.{name}")
        if found is not None:
            yield from _section(*found)


def _object_in(schema: Schema, path: str) -> tuple[str, Schema] | None:
    """The object that a field holds, itself or in a list, unless the field is refused anyway."""
    if _is_refused(schema):
        return None
    if schema.get("type") == "array":
        return _object_in(schema["items"], f"{path}[]")
    return (path, schema) if "properties" in schema else None


def _type(schema: Schema, path: str) -> str:
    """The type with its bounds; an object's is a link to its section."""
    if schema.get(INT_OR_STRING):
        return "integer or string"
    kind = schema.get("type", "any")
    if kind == "array":
        keys = f", one for each {' and '.join(f'`{key}`' for key in schema[LIST_KEYS])}" if LIST_KEYS in schema else ""
        return f"list of {_type(schema['items'], f'{path}[]')}{keys}"
    if "additionalProperties" in schema:
        return f"map of {_type(schema['additionalProperties'], path)}"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if kind == "object" and not _is_refused(schema) and not schema.get(PRESERVE):
        return f"[object](#{''.join(letter for letter in path.lower() if letter.isalnum())})"
    return " ".join(part for part in (kind, _range(schema)) if part)


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    words = []
    if low is not None:
        words.append(f"{'>' if schema.get('exclusiveMinimum') else '≥'} {low}")
    if high is not None:
        words.append(f"{'<' if schema.get('exclusiveMaximum') else '≤'} {high}")
    return ", ".join(words)


def _default(schema: Schema, required: bool) -> str:
    if required:
        return "**required**"
    if "default" not in schema or (isinstance(schema["default"], dict) and schema["default"]):
        return ""
    return f"`{_short(schema['default'])}`"


def _short(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _description(schema: Schema) -> str:
    """The description, and what the field's own rules say of it."""
    # Those of an object stand in its own section.
    own = [node for node in (schema, schema.get("items", {})) if "properties" not in node or _is_refused(schema)]
    messages = [rule["message"] for node in own for rule in node.get(RULES, [])]
    sentences = [schema.get("description", ""), *(f"*({message})*" for message in messages)]
    return _cell(" ".join(sentence for sentence in sentences if sentence))


def _rules_about(schema: Schema, title: str) -> Iterator[str]:
    messages = [rule["message"] for rule in schema.get(RULES, []) if "oldSelf" not in rule["rule"]]
    if messages:
        yield f"{title}:\n"
        yield from (f"- {message}" for message in messages)
        yield ""


def _is_refused(schema: Schema) -> bool:
    return any(rule["rule"] == "false" for rule in schema.get(RULES, []))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
