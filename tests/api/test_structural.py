"""The linter finds, one by one, what an API server would refuse and what users would regret."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_api.crd import build_crd, job_schema
from finetune_api.structural import lint

SPEC: dict[str, Any] = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 45}}},
        "spec": {
            "type": "object",
            "description": "Spec.",
            "required": ["type"],
            "properties": {
                "type": {"type": "string", "description": "Which.", "enum": ["A", "B"]},
                "size": {"type": "integer", "description": "How many.", "format": "int64", "default": 1},
                "optional": {"type": "object", "description": "An option.", "properties": {}},
            },
        },
    },
}


def with_field(**schema: Any) -> dict[str, Any]:
    """A schema whose spec has one more field."""
    found = copy.deepcopy(SPEC)
    found["properties"]["spec"]["properties"]["f"] = {"description": "F.", **schema}
    return found


def with_rule(**rule: str) -> dict[str, Any]:
    """A schema with one rule over its spec."""
    found = copy.deepcopy(SPEC)
    found["properties"]["spec"]["x-kubernetes-validations"] = [{"message": "no", **rule}]
    return found


def test_the_schemas_of_the_product_are_clean() -> None:
    assert lint(job_schema()) == []


def test_a_clean_schema_has_no_findings() -> None:
    assert lint(SPEC) == []


TEXT = {"type": "string", "maxLength": 9}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/x", "type": "object"}, "$ref is not allowed"),
        ({"type": "string", "maxLength": 1, "anyOf": []}, "anyOf is not allowed"),
        ({"type": "string", "maxLength": 1, "title": "F"}, "title is not allowed"),
        ({"type": "string", "maxLength": 1, "nullable": True}, "nullable is not allowed"),
        ({"type": "array", "maxItems": 1, "items": TEXT, "uniqueItems": True}, "uniqueItems is not allowed"),
        ({}, "no type"),
        ({"type": "null"}, "type 'null' cannot stand here"),
        ({"type": "string", "x-kubernetes-int-or-string": True, "maxLength": 1}, "type 'string' cannot stand here"),
        (
            {"type": "object", "properties": {}, "additionalProperties": TEXT, "maxProperties": 1},
            "exclude each other",
        ),
        (
            {"type": "object", "additionalProperties": False, "maxProperties": 1},
            "additionalProperties must be a schema",
        ),
        ({"type": "array", "maxItems": 1}, "a list needs one schema for its items"),
        ({"type": "integer", "exclusiveMinimum": 0}, "exclusiveMinimum must be a boolean beside minimum"),
        ({"type": "object", "required": ["gone"], "properties": {}}, "required but unknown: gone"),
        ({**TEXT, "pattern": "^a$"}, "a pattern is refused in words that only experts can read"),
        ({"type": "string"}, "no maxLength"),
        ({"x-kubernetes-int-or-string": True}, "no maxLength"),
        ({"type": "array", "items": TEXT}, "no maxItems"),
        ({"type": "object", "additionalProperties": TEXT}, "no maxProperties"),
        ({**TEXT, "default": None}, "the default null is refused"),
        ({**TEXT, "description": ""}, "no description"),
        ({"type": "object", "x-kubernetes-preserve-unknown-fields": True}, "CEL cannot compare"),
        (
            {"type": "array", "maxItems": 1, "items": {"type": "object"}, "x-kubernetes-list-type": "set"},
            "a list of type set needs scalar items",
        ),
        (
            {
                "type": "array",
                "maxItems": 1,
                "items": {"type": "object", "properties": {"name": {**TEXT, "description": "N."}}},
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
            "needs keys that its items require or default",
        ),
        (
            {"type": "array", "maxItems": 1, "items": TEXT, "x-kubernetes-list-map-keys": ["name"]},
            "needs x-kubernetes-list-type: map",
        ),
        (
            {"type": "object", "default": {}, "properties": {"a": {**TEXT, "description": "A.", "default": "x"}}},
            "spelt out in full, since CEL sees it raw; missing: .a",
        ),
        ({"type": "object", "default": {"b": 1}, "properties": {}}, "what the schema does not know: .b"),
    ],
)
def test_a_field_that_cannot_stand_is_found(schema: dict[str, Any], message: str) -> None:
    findings = lint(with_field(**schema))
    assert [finding for finding in findings if message in finding.message], findings
    assert {finding.path for finding in findings} == {"spec.f"}


@pytest.mark.parametrize("name", ["snake_case", "With-Hyphen", "Upper", "namespace", "in"])
def test_names_that_rules_would_have_to_escape_are_found(name: str) -> None:
    schema = copy.deepcopy(SPEC)
    schema["properties"]["spec"]["properties"][name] = {"description": "N.", **TEXT}
    assert [finding.path for finding in lint(schema)] == [f"spec.{name}"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("self.gone == 1", "self.gone is unknown"),
        ("has(self.gone)", "self.gone is unknown"),
        ("has(self.size)", "has(self.size) is always true"),
        ("has(self.type)", "has(self.type) is always true"),
        ("self.optional == self.optional", "self.optional may be absent; ask has(self.optional) first"),
    ],
)
def test_a_rule_that_would_raise_or_says_nothing_is_found(rule: str, message: str) -> None:
    assert [finding.message for finding in lint(with_rule(rule=rule)) if message in finding.message]


@pytest.mark.parametrize(
    "rule",
    [
        "self.size > 0 && self.type == 'self.gone'",
        "!has(self.optional) || self.optional == self.optional",
        "has(self.size) == has(oldSelf.size) && (!has(self.size) || self.size == oldSelf.size)",
        "self.type.startsWith('A')",
    ],
)
def test_a_rule_that_asks_first_is_fine(rule: str) -> None:
    assert lint(with_rule(rule=rule)) == []


def test_a_rule_needs_an_expression_and_a_message_of_one_line() -> None:
    for rule in ({"rule": "true", "message": ""}, {"rule": "", "message": "x"}, {"rule": "true", "message": "a\nb"}):
        assert [finding.message for finding in lint(with_rule(**rule))] == [
            "a rule needs an expression, and a message of one line"
        ]


def test_a_field_path_that_leads_nowhere_is_found() -> None:
    findings = lint(with_rule(rule="self.size > 0", fieldPath=".gone"))
    assert [str(finding) for finding in findings] == ["spec: rule 'self.size > 0': fieldPath .gone leads nowhere"]


def test_a_field_that_is_refused_anyway_may_be_open_and_unbounded() -> None:
    refused = [{"rule": "false", "message": "not yet"}]
    preserved = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    assert lint(with_field(**preserved, **{"x-kubernetes-validations": refused})) == []


def test_of_metadata_only_the_name_may_be_narrowed() -> None:
    schema = copy.deepcopy(SPEC)
    schema["properties"]["metadata"]["properties"]["labels"] = {"type": "object"}
    assert "only metadata.name and metadata.generateName may be narrowed" in {f.message for f in lint(schema)}


def test_the_crd_has_its_names_and_its_status_subresource() -> None:
    crd = build_crd()
    assert crd["metadata"]["name"] == "finetunejobs.finetune.dev"
    assert crd["spec"]["names"] == {
        **{"kind": "FineTuneJob", "listKind": "FineTuneJobList", "plural": "finetunejobs", "singular": "finetunejob"},
        **{"shortNames": ["ftj"], "categories": ["finetune"]},
    }
    (version,) = crd["spec"]["versions"]
    assert version["subresources"] == {"status": {}}
    assert version["schema"]["openAPIV3Schema"]["required"] == ["spec"]


def test_the_status_has_no_defaults() -> None:
    def defaults(schema: dict[str, Any]) -> bool:
        children = [schema.get("items"), schema.get("additionalProperties"), *schema.get("properties", {}).values()]
        return "default" in schema or any(defaults(child) for child in children if child)

    assert not defaults(job_schema()["properties"]["status"])
