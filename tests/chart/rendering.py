"""The chart, rendered by Helm itself in this process."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "finetune-operator"
RELEASE, NAMESPACE = "finetune", "finetune-system"

Object = dict[str, Any]


def rendered(values: Object | None = None, *, release: str = RELEASE, namespace: str = NAMESPACE) -> dict[str, str]:
    """Text by file name of the template, as `helm template` prints it; raises helm.HelmError for bad values."""
    return dict(_render(json.dumps(values or {}), release, namespace))


@cache
def _chart() -> helm.Chart:
    return helm.Chart.load(CHART)


@cache
def _render(values: str, release: str, namespace: str) -> dict[str, str]:
    _chart().validate_schema(json.loads(values))
    texts = _chart().render(json.loads(values), name=release, namespace=namespace)
    return {Path(path).name: text for path, text in texts.items()}


def objects(values: Object | None = None, **options: str) -> list[Object]:
    """All objects that an installation with these values would create."""
    return [item for name, text in rendered(values, **options).items() if name != "NOTES.txt" for item in load(text)]


def of_kind(kind: str, values: Object | None = None, **options: str) -> list[Object]:
    return [item for item in objects(values, **options) if item["kind"] == kind]


def pod_spec(values: Object | None = None) -> Object:
    (deployment,) = of_kind("Deployment", values)
    spec: Object = deployment["spec"]["template"]["spec"]
    return spec


def container(values: Object | None = None) -> Object:
    (only,) = pod_spec(values)["containers"]
    found: Object = only
    return found


def environment(values: Object | None = None) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container(values)["env"]}


def load(text: str) -> list[Object]:
    return [item for item in yaml.load_all(text, StrictLoader) if item]


def default_values() -> Object:
    values: Object = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


def leaves(values: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and default of every value; an empty map is a leaf, since its keys are the user's."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def nested(path: tuple[str, ...], value: Any) -> Object:
    """`a.b=1` as {"a": {"b": 1}}."""
    for key in reversed(path):
        value = {key: value}
    result: Object = value
    return result


def merged(first: Object, second: Object) -> Object:
    result = copy.deepcopy(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


class StrictLoader(yaml.CSafeLoader):
    """Refuses a key that stands twice in a map: YAML readers differ on which one counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
