"""What all types of the API share: naming on the wire, and the helpers by which a CEL rule stands beside its field."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

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


def cel(rule: str, message: str, **extra: str) -> dict[str, str]:
    """One CEL rule of the CRD; the message names the way out, the API server adds the field's path."""
    return {"rule": rule, "message": message, **extra}


def rules(*items: dict[str, str]) -> dict[str, Any]:
    """CEL rules in the form that `json_schema_extra` of a field or a model takes."""
    return {"x-kubernetes-validations": list(items)}


def ruled(*items: dict[str, str]) -> ConfigDict:
    """A model's configuration with CEL rules over its fields."""
    return ConfigDict(json_schema_extra=rules(*items))


def not_yet(what: str, instead: str) -> dict[str, Any]:
    """Refuse a field whose feature has not come yet: a setting that is taken must never be ignored."""
    return rules(cel("false", f"{what} is not supported yet; {instead}"))


def only(allowed: list[str], what: str) -> dict[str, Any]:
    """Refuse the values of an enumeration whose feature has not come yet."""
    values = ", ".join(f"'{value}'" for value in allowed)
    return rules(cel(f"self in [{values}]", f"this {what} is not supported yet; use one of {', '.join(allowed)}"))


def immutable(*fields: str) -> list[dict[str, str]]:
    """Transition rules under which optional fields can neither be changed nor removed nor added after creation."""
    return [
        cel(
            f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
            f"{field} cannot be changed after creation; delete the job and create it anew",
        )
        for field in fields
    ]
