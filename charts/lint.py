"""Lint of the Helm chart: what Helm itself says, and that values, schema, settings, versions and CRDs are in step.

Run by `make lint`; prints what is wrong and ends with 1 when something is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

from finetune_operator.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "finetune-operator"
SET_ELSEWHERE = {"trainer_image", "image_pull_policy", "image_pull_secrets", "network_policy", "namespaces", "lease"}
"""Settings that are made of values that say more than the operator's own variables: trainer, networkPolicies,
watch.namespaces, and where the release is."""
WARNING = 2


def main() -> int:
    problems = [
        *helm_findings(),
        *loose_objects(),
        *values_beside_schema(),
        *settings_drift(),
        *versions(),
        *crd_links(),
    ]
    for problem in problems:
        print(f"charts/finetune-operator: {problem}", file=sys.stderr)
    return 1 if problems else 0


def helm_findings() -> Iterator[str]:
    """`helm lint --strict`, but for remarks (an icon is recommended)."""
    report = helm.lint(CHART, strict=True)
    yield from (f"{m['path']}: {m['error']}" for m in report["messages"] if m["severity"] >= WARNING)


def loose_objects() -> Iterator[str]:
    """Objects of the schema that would take a misspelt value without a word."""
    for path, node in _objects(_schema(), "values"):
        if "properties" in node and node.get("additionalProperties") is not False:
            yield f"values.schema.json: {path} needs `additionalProperties: false`"


def _objects(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "properties" in node:
            yield path, node
        for key, value in node.items():
            yield from _objects(value, f"{path}.{key}")


def values_beside_schema() -> Iterator[str]:
    """Values of values.yaml that the schema does not name; the reverse is a value without default and documentation."""
    yield from _compare(yaml.safe_load((CHART / "values.yaml").read_text()), _schema(), "")


def _compare(values: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    schema = _schema()["definitions"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    if (
        not isinstance(values, dict) or "properties" not in schema or not values
    ):  # what is empty is for the user to fill
        return
    named = set(schema["properties"]) - {"global"}
    for key in sorted(set(values) ^ named):
        side = "values.yaml" if key in named else "values.schema.json"
        yield f"{side}: {path}{key} is missing"
    for key in sorted(set(values) & named):
        yield from _compare(values[key], schema["properties"][key], f"{path}{key}.")


def settings_drift() -> Iterator[str]:
    """Settings of the operator that the chart does not offer, offers with other defaults, or with other bounds."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    schema = _schema()["properties"]["settings"]["properties"]
    fields = {_camel(f.name): f for f in dataclasses.fields(Settings) if f.name not in SET_ELSEWHERE}
    yield from (f"settings.{name}: the operator has no such setting" for name in sorted(values.keys() - fields.keys()))
    for name, item in fields.items():
        if name not in values:
            yield f"settings.{name} is missing: the operator's setting {item.name} could not be set"
            continue
        if values[name] != item.default:
            yield f"settings.{name} is {values[name]!r} in values.yaml, but the operator's default is {item.default!r}"
        choices = list(item.metadata["choices"])
        if choices != schema[name].get("enum", []):
            yield f"values.schema.json: settings.{name} needs the enum {choices}"
        if (low := item.metadata["low"]) is not None and schema[name].get("minimum", float("-inf")) < low:
            yield f"values.schema.json: settings.{name} needs the minimum {low}"


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part.title() for part in tail)


def versions() -> Iterator[str]:
    """The chart's default tag is its appVersion, so it must be what `make images` builds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    yield from (
        f"Chart.yaml: {key} is {chart[key]}, pyproject.toml has {project}"
        for key in ("version", "appVersion")
        if chart[key] != project
    )


def crd_links() -> Iterator[str]:
    """Each generated CRD must lie in the chart, as a link: Helm packs what it points to, and no copy can grow stale."""
    for crd in sorted((ROOT / "crds").glob("*.yaml")):
        link = CHART / "files" / "crds" / crd.name
        if not link.is_symlink() or link.resolve() != crd:
            yield f"files/crds/{crd.name} must be a link: ln -s ../../../../crds/{crd.name} {link.relative_to(ROOT)}"


def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return schema


if __name__ == "__main__":
    sys.exit(main())
