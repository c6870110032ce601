"""What the chart installs. The CRDs' own content is tested with the API, what the values change in test_values.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import (
    CHART,
    NAMESPACE,
    RELEASE,
    ROOT,
    container,
    environment,
    load,
    objects,
    of_kind,
    pod_spec,
    rendered,
)

SNAPSHOTS = ROOT / "tests" / "chart" / "snapshots"
TEMPLATES = sorted(path.name for path in (CHART / "templates").glob("[!_]*") if path.name != "crds.yaml")
CRDS = sorted((ROOT / "crds").glob("*.yaml"))
NAMESPACED = {"watch": {"namespaces": ["ml", "vision"]}}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_defaults_render_as_before(template: str) -> None:
    """UPDATE_SNAPSHOTS=1 writes them anew; the difference then stands in the commit for all to read."""
    text, snapshot = rendered()[template], SNAPSHOTS / template
    if os.environ.get("UPDATE_SNAPSHOTS"):
        snapshot.write_text(text)
    assert text == snapshot.read_text()


def test_no_two_objects_share_kind_namespace_and_name() -> None:
    for values in ({}, NAMESPACED):
        names = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects(values)]
        assert len(names) == len(set(names))


def test_two_releases_of_one_name_in_two_namespaces_do_not_meet_outside_them() -> None:
    def outside(namespace: str) -> set[str]:
        found = objects({"crds": {"enabled": False}}, namespace=namespace)
        return {o["metadata"]["name"] for o in found if "namespace" not in o["metadata"]}

    assert outside("a")
    assert not outside("a") & outside("b")


@pytest.mark.parametrize("crd", CRDS, ids=lambda path: path.name)
def test_each_crd_is_installed_word_for_word_with_labels_and_the_wish_to_be_kept(crd: Path) -> None:
    source = yaml.safe_load(crd.read_text())
    (found,) = [o for o in of_kind("CustomResourceDefinition") if o["metadata"]["name"] == source["metadata"]["name"]]
    assert found["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
    assert found["spec"] == source["spec"]
    assert {key: value for key, value in found.items() if key not in ("metadata", "spec")} == {
        key: value for key, value in source.items() if key not in ("metadata", "spec", "status")
    }


def test_crds_that_are_not_to_be_kept_go_with_the_release() -> None:
    for crd in of_kind("CustomResourceDefinition", {"crds": {"keep": False}}):
        assert "annotations" not in crd["metadata"]


def test_crds_can_be_left_to_the_administrator() -> None:
    assert not of_kind("CustomResourceDefinition", {"crds": {"enabled": False}})


def test_the_images_default_to_the_release_of_the_chart() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert container()["image"] == f"finetune-operator:{version}"
    assert environment()["FINETUNE_OPERATOR_TRAINER_IMAGE"] == f"finetune-trainer:{version}"


def test_one_registry_serves_both_images() -> None:
    values = {"registry": "registry.example.com/ml", "image": {"tag": "2"}, "trainer": {"image": {"tag": "3-cpu"}}}
    assert container(values)["image"] == "registry.example.com/ml/finetune-operator:2"
    assert environment(values)["FINETUNE_OPERATOR_TRAINER_IMAGE"] == "registry.example.com/ml/finetune-trainer:3-cpu"


def test_a_digest_replaces_the_tag() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    values = {"image": {"tag": "2", "digest": digest}, "trainer": {"image": {"digest": digest}}}
    assert container(values)["image"] == f"finetune-operator@{digest}"
    assert environment(values)["FINETUNE_OPERATOR_TRAINER_IMAGE"] == f"finetune-trainer@{digest}"


def test_the_pod_passes_the_restricted_pod_security_standard() -> None:
    spec = pod_spec()
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} == {"emptyDir"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPort" in port for port in container()["ports"])


def test_the_service_and_the_probes_reach_the_port_that_the_operator_opens() -> None:
    (service,) = of_kind("Service", {"settings": {"httpPort": 9000}})
    operator = container({"settings": {"httpPort": 9000}})
    assert operator["ports"] == [{"name": "http", "containerPort": 9000}]
    assert service["spec"]["ports"] == [{"name": "http", "port": 9000, "targetPort": "http"}]
    assert {operator[f"{probe}Probe"]["httpGet"]["port"] for probe in ("liveness", "readiness", "startup")} == {"http"}
    (deployment,) = of_kind("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_extra_variables_can_name_another_way_to_the_api_server() -> None:
    extra = [{"name": "KUBERNETES_SERVICE_HOST", "value": "10.0.0.1"}]
    assert container({"extraEnv": extra})["env"][-1:] == extra


def test_long_names_are_cut_to_what_labels_take() -> None:
    names = [o["metadata"]["name"] for o in objects(release="r" * 53) if o["kind"] in ("Deployment", "Service")]
    assert all(len(name) <= 52 and not name.endswith("-") for name in names)


def test_the_replicas_are_spread_and_drained_one_at_a_time() -> None:
    (deployment,), (budget,) = of_kind("Deployment"), of_kind("PodDisruptionBudget")
    assert deployment["spec"]["replicas"] == 2
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (spread,) = pod_spec()["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    for selector in (spread["labelSelector"], budget["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    assert budget["spec"]["maxUnavailable"] == 1


def test_one_replica_alone_has_no_budget_that_would_block_every_drain() -> None:
    assert not of_kind("PodDisruptionBudget", {"replicas": 1})


def test_a_stopped_pod_has_longer_than_its_passes_to_give_up_its_lease() -> None:
    assert pod_spec({"settings": {"drainSeconds": 33.5}})["terminationGracePeriodSeconds"] == 44


def test_the_test_pod_asks_the_service_with_the_operators_image_under_restricted_security() -> None:
    (pod,), (service,) = of_kind("Pod"), of_kind("Service")
    (test,) = pod["spec"]["containers"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert test["image"] == container()["image"]
    assert f"http://{service['metadata']['name']}.{NAMESPACE}:8080" in test["command"][-1]
    assert test["securityContext"] == container()["securityContext"]
    # It must not be taken for a replica.
    assert not service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_the_notes_say_what_is_watched_and_what_to_do_next() -> None:
    assert "runs the FineTuneJobs of ml, vision." in rendered(NAMESPACED)["NOTES.txt"]
    assert (
        f"kubectl -n {NAMESPACE} rollout status deployment/finetune-operator"
        in (rendered(release="finetune-operator")["NOTES.txt"])
    )
    assert "EVERY FineTuneJob" in rendered({"crds": {"keep": False}})["NOTES.txt"]


def test_the_text_of_every_template_is_yaml_without_doubled_keys() -> None:
    for name, text in rendered(NAMESPACED).items():
        assert name == "NOTES.txt" or all(item["apiVersion"] for item in load(text))
