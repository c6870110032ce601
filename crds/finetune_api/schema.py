"""pydantic's JSON schema -> the structural schema of a CRD. Pure; what has no equivalent is refused, never dropped.

A CRD takes OpenAPI 3.0 with draft-4 numbers: no references, no null type, exclusive bounds as booleans, and every
node with one type of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]
RULES = "x-kubernetes-validations"
INT_OR_STRING = "x-kubernetes-int-or-string"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
LIST_TYPE = "x-kubernetes-list-type"
LIST_KEYS = "x-kubernetes-list-map-keys"

KEPT = (
    *("description", "type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties", "required"),
    *(LIST_TYPE, LIST_KEYS, PRESERVE, INT_OR_STRING, RULES),
)
"""Keywords that mean the same on both sides."""
TRANSLATED = {
    *("title", "default", "const", "exclusiveMinimum", "exclusiveMaximum", "properties", "items"),
    *("additionalProperties", "uniqueItems"),
}
FORMATS = {"integer": "int64", "number": "double"}
"""As in Kubernetes' own API: integers are 64 bits wide, and CEL's `double` is what `number` becomes."""


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model, with its names as on the wire.

    Raises:
        ValueError: a keyword or a combination without an equivalent; the message names the place.
    """
    schema = model.model_json_schema(by_alias=True)
    return _Converter(schema.pop("$defs", {})).convert(schema, model.__name__, ())


def without_defaults(schema: Schema) -> Schema:
    """For a status: what is true is written, never assumed."""
    found = {key: value for key, value in schema.items() if key != "default"}
    for key in ("items", "additionalProperties"):
        if key in found:
            found[key] = without_defaults(found[key])
    if "properties" in found:
        found["properties"] = {name: without_defaults(value) for name, value in found["properties"].items()}
    return found


class _Converter:
    """Holds the definitions that references point to."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def convert(self, node: Schema, path: str, above: tuple[str, ...]) -> Schema:
        """One node and all below it; `above` are the references that led here."""
        node, above = self._inlined(node, path, above)
        if unknown := node.keys() - {*KEPT, *TRANSLATED}:
            raise ValueError(f"{path}: {', '.join(sorted(unknown))} cannot be said in a CRD")
        found = {key: node[key] for key in KEPT if key in node}
        if "description" in found:
            found["description"] = " ".join(found["description"].split())
        if "const" in node:
            found["enum"] = [node["const"]]
        if node.get("type") in FORMATS:
            found.setdefault("format", FORMATS[node["type"]])
        if node.get("uniqueItems"):
            found.setdefault(LIST_TYPE, "set")
        if node.get("default") is not None:
            found["default"] = plain(node["default"])
        return {**found, **_bounds(node), **self._children(node, path, above)}

    def _inlined(self, node: Schema, path: str, above: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
        """The node without references and without null, what stands beside them merged over it."""
        while "$ref" in node or "anyOf" in node:
            beside = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
            if "$ref" in node:
                name = node["$ref"].rsplit("/", 1)[-1]
                if name in above:
                    raise ValueError(f"{path}: {name} contains itself, which a CRD cannot say")
                node, above = _merged(self._definitions[name], beside), (*above, name)
            else:
                node = _merged(_one_of(node["anyOf"], path), beside)
        return node, above

    def _children(self, node: Schema, path: str, above: tuple[str, ...]) -> Schema:
        found: Schema = {}
        if "properties" in node:
            found["properties"] = {
                name: self.convert(child, f"{path}.{name}", above) for name, child in node["properties"].items()
            }
        if "items" in node:
            found["items"] = self.convert(node["items"], f"{path}[]", above)
        values = node.get("additionalProperties", False)
        if isinstance(values, dict) and values:
            found["additionalProperties"] = self.convert(values, f"{path}{{}}", above)
        # dict[str, Any] has true here, Any is a node without a type; false (pydantic's "forbid") is what pruning
        # and strict field validation do without it.
        elif values is not False or not {"type", "enum", INT_OR_STRING} & node.keys():
            found[PRESERVE] = True
        return found


def _one_of(options: list[Schema], path: str) -> Schema:
    """The one option beside null; an integer or a string is the only other union that a CRD knows."""
    real = [option for option in options if option.get("type") != "null"]
    if len(real) == 1:
        return real[0]
    if sorted(str(option.get("type")) for option in real) == ["integer", "string"]:
        bounds = {key: value for option in real for key, value in option.items() if key != "type"}
        return {**bounds, INT_OR_STRING: True}
    raise ValueError(f"{path}: a union cannot be said in a CRD; use one object with optional members and a CEL rule")


def _merged(base: Schema, beside: Schema) -> Schema:
    """What stands beside a reference wins, except that rules add up, in order."""
    rules = [*base.get(RULES, []), *beside.get(RULES, [])]
    return {**base, **beside, **({RULES: rules} if rules else {})}


def _bounds(node: Schema) -> Schema:
    """Exclusive bounds: the next integer, or for numbers the bound with a flag, as in draft 4."""
    found: Schema = {}
    for side, step in (("Minimum", 1), ("Maximum", -1)):
        bound = node.get(f"exclusive{side}")
        if bound is None:
            continue
        if node.get("type") == "integer":
            found[side.lower()] = bound + step
        else:
            found |= {side.lower(): plain(bound), f"exclusive{side}": True}
    return found


def plain(value: Any) -> Any:
    """A default as the API server shows it: without absent fields, 1.0 as 1."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
