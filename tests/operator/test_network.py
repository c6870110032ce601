"""The NetworkPolicy of a job: who may connect to its pods, and whom they may connect to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.contract import PROGRESS_PORT
from finetune_operator.cluster.port import JOB, NETWORK_POLICY, Key, Object
from finetune_operator.plan import plan
from finetune_operator.settings import Settings, SettingsError
from tests.operator.world import World, typed

GATE = {"operatorNamespace": "system", "operatorLabels": {"app": "operator"}, "ingress": [], "egress": []}
GANG = {"podSelector": {"matchLabels": {"finetune.dev/job": "tune"}}}


def settings(**gate: Any) -> Settings:
    return Settings(network_policy=json.dumps({**GATE, **gate}))


def policy(**gate: Any) -> Object:
    found = plan(typed(), settings(**gate)).network_policy
    assert found is not None
    spec: Object = found["spec"]
    return spec


def test_a_jobs_pods_hear_each_other_and_on_one_port_the_operator_and_nobody_else() -> None:
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "system"}},
        "podSelector": {"matchLabels": {"app": "operator"}},
    }
    assert policy() == {
        **GANG,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [GANG]}, {"from": [operator], "ports": [{"port": PROGRESS_PORT, "protocol": "TCP"}]}],
    }


def test_what_may_connect_besides_is_the_administrators() -> None:
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]}
    assert policy(ingress=[rule])["ingress"][-1] == rule


def test_egress_is_bounded_when_it_is_asked_for_and_leaves_names_and_peers() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}
    spec = policy(egress=[rule])
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    peers, names, given = spec["egress"]
    assert peers == {"to": [GANG]}
    assert {(port["port"], port["protocol"]) for port in names["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert given == rule


def test_it_selects_the_pods_that_the_job_becomes() -> None:
    manifests = plan(typed(), settings())
    labels = manifests.workload["spec"]["template"]["metadata"]["labels"]
    assert GANG["podSelector"]["matchLabels"].items() <= labels.items()
    assert manifests.all().index(manifests.network_policy) < manifests.all().index(manifests.workload)  # type: ignore[arg-type]


def test_without_the_setting_there_is_none() -> None:
    assert plan(typed(), Settings()).network_policy is None


async def test_it_is_there_before_the_pods_and_goes_with_the_job() -> None:
    world = World(settings())
    job = await world.create()
    await world.settle()
    found = await world.cluster.read(NETWORK_POLICY, Key("ml", "tune"))
    assert found is not None
    assert found["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]


async def test_the_pod_that_checks_a_job_is_fenced_off_from_its_beginning() -> None:
    world = World(settings())
    kinds: list[str] = []
    world.cluster.subscribe(lambda change: kinds.append(change.kind.kind) if change.type == "ADDED" else None)
    await world.create(resources={"gpusPerNode": 1, "gpuProduct": "NVIDIA-L4"})
    await world.pass_once()
    assert kinds[:4] == ["FineTuneJob", "ConfigMap", "NetworkPolicy", "Job"]
    (job,) = await world.cluster.list(JOB, None, {})
    assert GANG["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("text", ["{", "[]", '{"operatorNamespace": "a"}', json.dumps({**GATE, "more": 1})])
def test_a_setting_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="FINETUNE_OPERATOR_NETWORK_POLICY"):
        dataclasses.replace(Settings(), network_policy=text)


def test_secrets_for_pulling_come_to_those_of_the_job_and_each_once() -> None:
    job = typed(podTemplate={"imagePullSecrets": ["own", "both"]})
    pod = plan(job, Settings(image_pull_secrets=("both", "all"))).workload["spec"]["template"]["spec"]
    assert pod["imagePullSecrets"] == [{"name": "own"}, {"name": "both"}, {"name": "all"}]


def test_the_charts_example_opens_the_port_that_there_is_to_scrape() -> None:
    values = Path(__file__).parents[2] / "charts" / "finetune-operator" / "values.yaml"
    _, example = values.read_text().split("kubernetes.io/metadata.name: monitoring", 1)
    assert f"ports: [{{port: {PROGRESS_PORT}}}]" in example.splitlines()[1]
