"""Alerts and dashboard: every metric that they ask for is one that the operator has, and is described."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from finetune_operator.metrics import Metrics
from finetune_operator.watches import Watches
from tests.chart.rendering import CHART, ROOT, Object, of_kind
from tests.chart.test_values import ALL_ON

NAME = re.compile(r"finetune_operator_[a-z_]+")
LABELS = re.compile(r"(?:by|without) \(([^)]*)\)|\{([^}]*)\}")
FROM_PROMETHEUS = {"pod", "le"}


def samples() -> dict[str, set[str]]:
    """Name -> labels of every sample that the operator serves."""
    metrics = Metrics()
    metrics.watch(Watches(lambda: 0.0))
    metrics.answered("GET", 200, 0.1)
    spec = {"resources": {"nodes": 1, "gpusPerNode": 1}}
    metrics.jobs.see({"metadata": {"namespace": "ml", "name": "a"}, "spec": spec, "status": {"phase": "Running"}})
    found = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in found}


def alerts() -> list[Object]:
    groups: Object = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    return [rule for group in groups["groups"] for rule in group["rules"]]


def dashboard() -> Object:
    found: Object = json.loads((CHART / "files" / "dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    targets: list[Any] = [target for panel in dashboard()["panels"] for target in panel["targets"]]
    return [target["expr"] for target in targets] + [rule["expr"] for rule in alerts()]


def test_every_metric_of_alerts_and_dashboard_exists() -> None:
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert asked
    assert asked <= samples().keys()


def test_every_label_of_alerts_and_dashboard_exists_on_its_metrics() -> None:
    have = samples()
    for expression in expressions():
        known = set.union(*(have[name] for name in NAME.findall(expression))) | FROM_PROMETHEUS
        for by, selector in LABELS.findall(expression):
            asked = {part.strip() for part in by.split(",")} if by else set(re.findall(r"(\w+)[=!]", selector))
            assert asked <= known, expression


def test_every_metric_of_the_operator_is_on_the_dashboard_and_in_the_documentation() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    shown = " ".join(expressions())
    for name in samples():
        family = re.sub("_(created|bucket|sum|count|total)$", "", name)
        assert family in shown, family
        assert family in text, family


def test_every_alert_says_what_is_wrong_and_what_to_do_and_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    for rule in alerts():
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["alert"] in text


def test_they_are_installed_where_they_are_wished_for_and_nowhere_else() -> None:
    (rules,) = of_kind("PrometheusRule", ALL_ON)
    assert [rule for group in rules["spec"]["groups"] for rule in group["rules"]] == alerts()
    (config_map,) = of_kind("ConfigMap", ALL_ON)
    assert json.loads(config_map["data"]["finetune-operator.json"]) == dashboard()
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    for kind in ("PrometheusRule", "ServiceMonitor", "ConfigMap"):
        assert not of_kind(kind)


def test_prometheus_finds_the_port_of_the_service() -> None:
    (monitor,), (service,) = of_kind("ServiceMonitor", ALL_ON), of_kind("Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
