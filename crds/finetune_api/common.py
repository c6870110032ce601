"""What all types of the API share: naming on the wire, and the helpers by which a CEL rule stands beside its field."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Rules = list[dict[str, str]]
"""The value of `x-kubernetes-validations`: CEL rules with their messages."""


class Message(BaseModel):
    """Base of everything that is written as JSON: snake_case here, camelCase on the wire.

    Unknown fields are ignored, so that an older reader understands a newer writer; people's mistakes are
    caught where people write, by the API server's field validation and by `finetune validate`.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True, extra="ignore", use_enum_values=False
    )

    @classmethod
    def from_wire(cls, data: Any) -> Self:
        """Parse a JSON-like value with camelCase keys; raises pydantic.ValidationError."""
        return cls.model_validate(data)

    def to_wire(self) -> dict[str, Any]:
        """As JSON-like values with camelCase keys; what is None is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class As:
    """Annotates a plain dictionary with the schema of a type."""

    def __init__(self, described_by: type[Message]) -> None:
        self._described_by = described_by

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self._described_by.__pydantic_core_schema__)


def cel(rule: str, message: str, at: str = "") -> dict[str, str]:
    """One CEL rule of the CRD; the message names the way out.

    Args:
        at: path below the rule's place (`.lora`) of the field that has to go or to change. The refusal is then
            reported there, as forbidden; otherwise at the rule's own place, as an invalid value.
    """
    found = {"rule": rule, "message": message}
    return {**found, "fieldPath": at, "reason": "FieldValueForbidden"} if at else found


def missing(rule: str, message: str, at: str) -> dict[str, str]:
    """A CEL rule by which the field at a path below must be set; the refusal is reported there, as required."""
    return {"rule": rule, "message": message, "fieldPath": at, "reason": "FieldValueRequired"}


def form(pattern: str, message: str) -> dict[str, str]:
    """The form of a string. As a rule, since a bare `pattern` is refused in words that only experts can read."""
    return cel(f"self.matches('{pattern}')", message)


def rules(*items: dict[str, str]) -> dict[str, Any]:
    """CEL rules in the form that `json_schema_extra` of a field or a model takes."""
    return {"x-kubernetes-validations": list(items)}


def ruled(*items: dict[str, str]) -> ConfigDict:
    """A model's configuration with CEL rules over its fields."""
    return ConfigDict(json_schema_extra=rules(*items))


def not_yet(what: str, instead: str) -> dict[str, Any]:
    """Refuse a field whose feature has not come yet: a setting that is taken must never be ignored."""
    message = f"{what} is not supported yet; {instead}"
    return rules({**cel("false", message), "reason": "FieldValueForbidden"})


def only(allowed: list[str], what: str) -> dict[str, Any]:
    """Refuse the values of an enumeration whose feature has not come yet."""
    values = ", ".join(f"'{value}'" for value in allowed)
    return rules(cel(f"self in [{values}]", f"this {what} is not supported yet; use one of {', '.join(allowed)}"))


def immutable(*fields: str) -> list[dict[str, str]]:
    """Transition rules under which optional fields can neither be changed nor removed nor added after creation.

    They hold for fields that are typed throughout: what lies in `x-kubernetes-preserve-unknown-fields` is compared
    by the number of its fields and the values of common ones only (seen with Kubernetes 1.36).
    """
    return [
        cel(
            f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
            f"{field} cannot be changed after creation; delete the job and create it anew",
            at=f".{field}",
        )
        for field in fields
    ]


def keyed_by(*names: str) -> dict[str, Any]:
    """A list whose items are told apart by these fields: no two are equal, and server-side apply merges them."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(names)}


UNIQUE: dict[str, Any] = {"x-kubernetes-list-type": "set"}
"""A list without equal items, whose order means nothing."""
