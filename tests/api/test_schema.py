"""From pydantic's JSON schema to a structural one: each thing that pydantic says differently."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from finetune_api.common import As, Message, cel, not_yet, ruled
from finetune_api.schema import plain, structural, without_defaults


class Colour(str, Enum):
    RED = "Red"
    BLUE = "Blue"


class Inner(Message):
    """Docstring of the type,
    over two lines."""

    model_config = ruled(cel("self.size > 1", "first"))

    size: int = 3


def field(annotation: Any, default: Any = ..., **extra: Any) -> dict[str, Any]:
    """The schema of one field."""
    config = ConfigDict(arbitrary_types_allowed=True)
    model = type(
        "M", (BaseModel,), {"__annotations__": {"f": annotation}, "f": Field(default, **extra), "model_config": config}
    )
    found: dict[str, Any] = structural(model)["properties"]["f"]
    return found


@pytest.mark.parametrize(
    ("annotation", "extra", "expected"),
    [
        pytest.param(int, {}, {"type": "integer", "format": "int64"}, id="integers have 64 bits"),
        pytest.param(float, {}, {"type": "number", "format": "double"}, id="numbers are doubles"),
        pytest.param(int, {"gt": 0}, {"type": "integer", "format": "int64", "minimum": 1}, id="gt of an integer"),
        pytest.param(int, {"lt": 9}, {"type": "integer", "format": "int64", "maximum": 8}, id="lt of an integer"),
        pytest.param(
            float,
            {"gt": 0, "le": 1},
            {"type": "number", "format": "double", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
            id="gt of a number is a flag",
        ),
        pytest.param(
            float,
            {"lt": 1},
            {"type": "number", "format": "double", "maximum": 1, "exclusiveMaximum": True},
            id="lt of a number is a flag",
        ),
        pytest.param(Literal["x"], {}, {"type": "string", "enum": ["x"]}, id="const is an enum of one"),
        pytest.param(Literal["x", "y"], {}, {"type": "string", "enum": ["x", "y"]}, id="literals are an enum"),
        pytest.param(Colour, {}, {"type": "string", "enum": ["Red", "Blue"]}, id="references are inlined"),
        pytest.param(str, {"max_length": 5}, {"type": "string", "maxLength": 5}, id="titles go"),
        pytest.param(
            set[str], {}, {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"}, id="sets"
        ),
        pytest.param(
            dict[str, str], {}, {"type": "object", "additionalProperties": {"type": "string"}}, id="maps of text"
        ),
        pytest.param(
            dict[str, str],
            {"max_length": 4},
            {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 4},
            id="bounded maps",
        ),
        pytest.param(
            dict[str, Any], {}, {"type": "object", "x-kubernetes-preserve-unknown-fields": True}, id="maps of anything"
        ),
        pytest.param(Any, {}, {"x-kubernetes-preserve-unknown-fields": True}, id="anything"),
        pytest.param(int | str, {}, {"x-kubernetes-int-or-string": True}, id="integer or string"),
        pytest.param(
            list[int],
            {"max_length": 3},
            {"type": "array", "items": {"type": "integer", "format": "int64"}, "maxItems": 3},
            id="lists of integers",
        ),
    ],
)
def test_what_pydantic_says_becomes_structural(
    annotation: Any, extra: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert field(annotation, **extra) == expected


def test_an_optional_field_is_one_that_may_be_absent() -> None:
    assert field(int | None, None, ge=1) == {"type": "integer", "format": "int64", "minimum": 1}


def test_an_optional_object_keeps_what_stands_beside_the_reference() -> None:
    found = field(Inner | None, None, description="of the field", json_schema_extra=not_yet("f", "remove it"))
    assert found["type"] == "object"
    assert found["description"] == "of the field"
    assert [rule["rule"] for rule in found["x-kubernetes-validations"]] == ["self.size > 1", "false"]
    assert "default" not in found


def test_docstrings_become_descriptions_of_one_line() -> None:
    assert field(Inner)["description"] == "Docstring of the type, over two lines."


def test_the_default_of_an_object_is_spelt_out_without_what_is_absent() -> None:
    class Outer(Message):
        number: float = 2.0
        absent: int | None = None

    assert field(Outer, Outer())["default"] == {"number": 2}


def test_false_and_empty_defaults_are_kept() -> None:
    assert field(bool, False)["default"] is False
    assert field(list[str], [])["default"] == []


def test_fields_that_forbid_others_say_nothing_of_it() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")
        f: int

    assert structural(Strict) == {
        "type": "object",
        "properties": {"f": {"type": "integer", "format": "int64"}},
        "required": ["f"],
    }


def test_a_dictionary_can_have_the_schema_of_a_type() -> None:
    found = field(list[Annotated[dict[str, Any], As(Inner)]])
    assert found["items"]["properties"] == {"size": {"type": "integer", "format": "int64", "default": 3}}


def test_names_are_those_of_the_wire() -> None:
    class Named(Message):
        two_words: str
        other: str = Field(alias="rsLoRA")

    assert structural(Named)["properties"].keys() == {"twoWords", "rsLoRA"}


class Tree(BaseModel):
    children: list[Tree] = []


class Cat(BaseModel):
    type: Literal["Cat"]


class Dog(BaseModel):
    type: Literal["Dog"]


def test_a_type_that_contains_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="Tree contains itself, which a CRD cannot say"):
        structural(Tree)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        pytest.param(Cat | Dog, "a union cannot be said in a CRD", id="union of models"),
        pytest.param(int | bool, "a union cannot be said in a CRD", id="union of scalars"),
        pytest.param(
            Annotated[Cat | Dog, Field(discriminator="type")], "discriminator, oneOf cannot be said", id="tagged union"
        ),
        pytest.param(tuple[int, str], "prefixItems cannot be said", id="tuple"),
    ],
)
def test_what_a_crd_cannot_say_is_refused_and_not_dropped(annotation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"M\.f: .*{message}"):
        field(annotation)


def test_a_status_has_no_defaults_at_any_depth() -> None:
    schema = {
        "type": "object",
        "default": {},
        "properties": {"l": {"type": "array", "items": {"type": "string", "default": "x"}, "default": []}},
    }
    assert without_defaults(schema) == {
        "type": "object",
        "properties": {"l": {"type": "array", "items": {"type": "string"}}},
    }


def test_a_field_called_default_survives_in_a_status() -> None:
    schema = {"type": "object", "properties": {"default": {"type": "string", "default": "x"}}}
    assert without_defaults(schema) == {"type": "object", "properties": {"default": {"type": "string"}}}


def test_whole_numbers_are_written_as_the_server_shows_them() -> None:
    assert plain({"a": 1.0, "b": [2.0, 0.5], "c": None, "d": True}) == {"a": 1, "b": [2, 0.5], "d": True}
