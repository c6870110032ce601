"""Values: each has an effect, each misspelling is refused, each setting arrives in the operator."""

from __future__ import annotations

import dataclasses
from typing import Any

import helm_python as helm
import pytest

from finetune_operator.settings import Settings, load
from tests.chart.rendering import default_values, environment, leaves, merged, nested, rendered

OTHERWISE: dict[str, Any] = {
    "image.digest": "sha256:" + "0" * 64,
    "trainer.image.digest": "sha256:" + "0" * 64,
    "image.pullPolicy": "Never",
    "trainer.image.pullPolicy": "Never",
    "imagePullSecrets": [{"name": "credentials"}],
    "trainer.imagePullSecrets": [{"name": "credentials"}],
    "networkPolicies.ingress": [{"from": [{"podSelector": {}}]}],
    "networkPolicies.egress": [{"ports": [{"port": 443}]}],
    "monitoring.serviceMonitor.interval": "5s",
    "topologySpreadConstraints": [],
    "watch.namespaces": ["ml"],
    "settings.logFormat": "json",
    "settings.logLevel": "DEBUG",
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example.com"}],
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
}
"""Other values where what changed() makes up would not pass the schema."""

LEAVES = {".".join(path): (path, default) for path, default in leaves(default_values())}
FREE_MAPS = {("resources", "requests"), ("resources", "limits"), ("monitoring", "dashboard", "labels")}
"""Resources have names of their own, such as nvidia.com/gpu, and so have labels."""
ALL_ON = {"monitoring": {part: {"enabled": True} for part in ("serviceMonitor", "rules", "dashboard")}}
MAPS = sorted({path[:depth] for path, _ in LEAVES.values() for depth in range(len(path))} - FREE_MAPS)


def changed(name: str, default: Any) -> Any:
    if name in OTHERWISE:
        return OTHERWISE[name]
    match default:
        case bool():
            return not default
        case int() | float():
            return default + 1
        case str():
            return "changed"
        case _:
            return {"example.com-key": "value"}


@pytest.mark.parametrize("name", LEAVES)
def test_each_value_has_an_effect(name: str) -> None:
    path, default = LEAVES[name]
    base = {} if path[-1] == "enabled" else ALL_ON
    assert rendered(merged(base, nested(path, changed(name, default)))) != rendered(base)


@pytest.mark.parametrize("path", MAPS, ids=".".join)
def test_a_misspelt_value_is_refused_on_every_level(path: tuple[str, ...]) -> None:
    with pytest.raises(helm.HelmValuesError, match="misspelt"):
        rendered(nested((*path, "misspelt"), "value"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image.digest", "sha256:short"),
        ("image.pullPolicy", "Sometimes"),
        ("image.repository", ""),
        ("watch.namespaces", ["Not_a_namespace"]),
        ("watch.namespaces", "ml"),
        ("settings.workers", 0),
        ("settings.httpPort", 0),
        ("settings.logFormat", "xml"),
        ("crds.keep", "yes"),
        ("extraEnv", [{"value": "without a name"}]),
        ("tolerations", [{"efect": "NoSchedule"}]),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_installed(name: str, value: Any) -> None:
    with pytest.raises(helm.HelmValuesError, match=name.rsplit(".", 1)[-1]):
        rendered(nested(tuple(name.split(".")), value))


def test_the_operator_reads_back_every_default_that_the_chart_sends() -> None:
    sent = load([], environment({"networkPolicies": {"enabled": False}}))
    assert dataclasses.replace(sent, trainer_image=Settings.trainer_image, lease="") == Settings()


def test_the_operator_reads_back_every_setting_that_is_changed() -> None:
    values = {name: changed(f"settings.{name}", default) for name, default in default_values()["settings"].items()}
    values["clusterDomain"] = "cluster.example"
    trainer = {"image": {"pullPolicy": "Never"}, "imagePullSecrets": [{"name": "a"}, {"name": "b"}]}
    others = {"watch": {"namespaces": ["ml", "vision"]}, "trainer": trainer}
    sent = load([], environment(merged({"settings": values}, others)))
    assert (sent.namespaces, sent.image_pull_policy, sent.cluster_domain) == (
        ("ml", "vision"),
        "Never",
        "cluster.example",
    )
    assert sent.image_pull_secrets == ("a", "b")
    unchanged = [f.name for f in dataclasses.fields(Settings) if getattr(sent, f.name) == getattr(Settings(), f.name)]
    assert unchanged == []
