"""A linter for the schemas of CRDs: what an API server would refuse, and what it would take but users would regret.

Pure. The second kind are our own rules: everything described and bounded, CEL rules that can neither raise nor be
always true, nothing left open that CEL cannot compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.schema import INT_OR_STRING, KEPT, LIST_KEYS, LIST_TYPE, PRESERVE, RULES, Schema

KEYWORDS = {
    *KEPT,
    *("default", "properties", "items", "additionalProperties", "exclusiveMinimum", "exclusiveMaximum"),
}
TYPES = {"object", "array", "string", "integer", "number", "boolean"}
BOUNDS = {"string": "maxLength", "array": "maxItems"}
NAME = re.compile(r"[a-z][A-Za-z0-9]*")
CEL_KEYWORDS = {
    *("true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if"),
    *("import", "let", "loop", "package", "namespace", "return", "var", "void", "while"),
}
MEMBER = r"((?:\.[A-Za-z]\w*)+)(?!\w*\()"


@dataclass(frozen=True)
class Finding:
    """One thing to mend, and the way to it from the root of the schema."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path or '(root)'}: {self.message}"


def lint(schema: Schema) -> list[Finding]:
    """All that is wrong with an openAPIV3Schema."""
    return [*_root(schema), *_node(schema, "", described=True)]


def _root(schema: Schema) -> Iterator[Finding]:
    if schema.get("type") != "object":
        yield Finding("", "the root must be of type object")
    metadata = schema.get("properties", {}).get("metadata", {})
    if metadata.keys() - {"type", "properties"} or metadata.get("properties", {}).keys() - {"name", "generateName"}:
        yield Finding("metadata", "only metadata.name and metadata.generateName may be narrowed")


def _node(schema: Schema, path: str, described: bool = False, refused: bool = False) -> Iterator[Finding]:
    """One node and all below it.

    Args:
        described: whether the description stands elsewhere (list items and map values are described by their parent).
        refused: whether a rule above refuses the field whatever it holds.
    """
    refused = refused or any(rule.get("rule") == "false" for rule in schema.get(RULES, []))
    of_the_server = path in ("metadata", "metadata.name")
    yield from (Finding(path, message) for message in _shape(schema))
    yield from (Finding(path, message) for message in _rules(schema))
    if not (of_the_server or described or schema.get("description")):
        yield Finding(path, "no description")
    if not (of_the_server or refused or path in ("apiVersion", "kind")):
        yield from (Finding(path, message) for message in _limits(schema))
    for name, child in schema.get("properties", {}).items():
        where = f"{path}.{name}" if path else name
        if not NAME.fullmatch(name) or name in CEL_KEYWORDS:
            yield Finding(where, "names are camelCase and no words of CEL, which rules would have to escape")
        yield from _node(child, where, refused=refused)
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(key), dict):
            yield from _node(schema[key], path + mark, described=True, refused=refused)


def _shape(schema: Schema) -> Iterator[str]:
    """What makes a schema structural."""
    if unknown := schema.keys() - KEYWORDS:
        yield f"{', '.join(sorted(unknown))} is not allowed in a structural schema"
    kind = schema.get("type")
    if kind is None and not (schema.get(INT_OR_STRING) or schema.get(PRESERVE)):
        yield "no type"
    if kind is not None and (kind not in TYPES or schema.get(INT_OR_STRING)):
        yield f"type {kind!r} cannot stand here"
    if "properties" in schema and "additionalProperties" in schema:
        yield "properties and additionalProperties exclude each other"
    if isinstance(schema.get("additionalProperties"), bool):
        yield "additionalProperties must be a schema; what is unknown is pruned without it"
    if kind == "array" and not isinstance(schema.get("items"), dict):
        yield "a list needs one schema for its items"
    for side in ("exclusiveMinimum", "exclusiveMaximum"):
        if not isinstance(schema.get(side, True), bool):
            yield f"{side} must be a boolean beside {side.removeprefix('exclusive').lower()}"
    if missing := set(schema.get("required", [])) - schema.get("properties", {}).keys():
        yield f"required but unknown: {', '.join(sorted(missing))}"
    yield from _list_type(schema)
    yield from _default(schema)
    yield from _pattern(schema)


def _list_type(schema: Schema) -> Iterator[str]:
    kind, items = schema.get(LIST_TYPE), schema.get("items", {})
    if kind == "map":
        keys = schema.get(LIST_KEYS, [])
        settled = {*items.get("required", []), *(n for n, p in items.get("properties", {}).items() if "default" in p)}
        if not keys or set(keys) - settled:
            yield "a list of type map needs keys that its items require or default"
    elif LIST_KEYS in schema:
        yield f"{LIST_KEYS} needs {LIST_TYPE}: map"
    if kind == "set" and items.get("type") in ("object", "array"):
        yield "a list of type set needs scalar items"


def _default(schema: Schema) -> Iterator[str]:
    if "default" not in schema:
        return
    if schema["default"] is None:
        yield "the default null is refused"
    if missing := sorted(_missing(schema, schema["default"], "")):
        yield f"the default must be spelt out in full, since CEL sees it raw; missing: {', '.join(missing)}"
    if unknown := sorted(_unknown(schema, schema["default"], "")):
        yield f"the default has what the schema does not know: {', '.join(unknown)}"


def _missing(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name in value:
                yield from _missing(child, value[name], f"{path}.{name}")
            elif "default" in child or name in schema.get("required", []):
                yield f"{path}.{name}"


def _unknown(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict) and "properties" in schema:
        for name, item in value.items():
            if name not in schema["properties"]:
                yield f"{path}.{name}"
            else:
                yield from _unknown(schema["properties"][name], item, f"{path}.{name}")


def _pattern(schema: Schema) -> Iterator[str]:
    if "pattern" in schema:
        yield "a pattern is refused in words that only experts can read; use common.form"


def _limits(schema: Schema) -> Iterator[str]:
    """Bounds, without which rules cost too much and a job may outgrow its ConfigMap."""
    kind = "string" if schema.get(INT_OR_STRING) else schema.get("type")
    bound = "maxProperties" if "additionalProperties" in schema else BOUNDS.get(str(kind))
    if bound and bound not in schema and "enum" not in schema:
        yield f"no {bound}"
    if schema.get(PRESERVE):
        yield "what no schema knows, CEL cannot compare: an immutable field would only seem to be one; type it"


def _rules(schema: Schema) -> Iterator[str]:
    for rule in schema.get(RULES, []):
        if not rule.get("rule") or not rule.get("message") or "\n" in rule["message"]:
            yield "a rule needs an expression, and a message of one line"
            continue
        for problem in _members(rule["rule"], schema):
            yield f"rule {rule['rule']!r}: {problem}"
        if "fieldPath" in rule and _resolve(rule["fieldPath"], schema) is None:
            yield f"rule {rule['rule']!r}: fieldPath {rule['fieldPath']} leads nowhere"


def _members(rule: str, schema: Schema) -> Iterator[str]:
    """CEL raises on an absent field, and has() of one with a default is always true."""
    text = re.sub(r"'[^']*'", "''", rule)
    asked = set(re.findall(r"has\(self" + MEMBER + r"\)", text))
    for path in sorted(asked):
        found = _resolve(path, schema)
        if found is None:
            yield f"self{path} is unknown"
        elif _always_there(path, schema) and "oldSelf" not in text:
            yield f"has(self{path}) is always true: the field is required or has a default"
    for path in sorted(set(re.findall(r"\bself" + MEMBER, text)) - asked):
        if _is_metadata(path) or schema.get("type") != "object" or "properties" not in schema:
            continue
        if _resolve(path, schema) is None:
            yield f"self{path} is unknown"
        elif not _always_there(path, schema, asked):
            yield f"self{path} may be absent; ask has(self{path}) first"


def _is_metadata(path: str) -> bool:
    return path in (".metadata.name", ".metadata.generateName")


def _always_there(path: str, schema: Schema, asked: set[str] | None = None) -> bool:
    """Whether every step of a path is required, has a default, or was asked for in the same rule."""
    walked, node = "", schema
    for name in path.strip(".").split("."):
        walked += f".{name}"
        optional = name not in node.get("required", []) and "default" not in node["properties"][name]
        if optional and walked not in (asked or set()):
            return False
        node = node["properties"][name]
    return True


def _resolve(path: str, schema: Schema) -> Schema | None:
    node: Schema | None = schema
    for name in path.strip(".").split("."):
        node = node.get("properties", {}).get(name) if node else None
    return node
