"""The cluster port and the whole operator on a real API server. No image is pulled and nothing trains: the pods name a
scheduler that does not exist, and the test plays the kubelet by writing their status."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from finetune_operator.cluster import kubernetes
from finetune_operator.cluster.kubernetes import KubernetesCluster, connect, load_configuration
from finetune_operator.cluster.port import (
    CONFIG_MAP,
    EVENT,
    FINE_TUNE_JOB,
    JOB,
    POD,
    SERVICE,
    ConflictError,
    ForbiddenError,
    InvalidError,
    Key,
    Object,
)
from tests.e2e.cluster import apply, get, items, kubectl
from tests.e2e.operating import Operator, eventually, live_pod, play_kubelet, reaches, result_of, tune


@pytest.fixture
async def cluster() -> AsyncIterator[KubernetesCluster]:
    async with connect(await load_configuration()) as connected:
        yield connected


def config_map(namespace: str, name: str, labels: dict[str, str] | None = None, **data: str) -> Object:
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


# --- the port --------------------------------------------------------------------------------------------------------


async def test_create_read_and_a_name_that_is_taken(cluster: KubernetesCluster, namespace: str) -> None:
    key = Key(namespace, "created")
    assert await cluster.read(CONFIG_MAP, key) is None
    made = await cluster.create(config_map(namespace, key.name, a="1"))
    assert await cluster.read(CONFIG_MAP, key) == made
    with pytest.raises(ConflictError, match="already exists"):
        await cluster.create(config_map(namespace, key.name))


async def test_apply_creates_updates_and_does_not_revive_what_is_gone(
    cluster: KubernetesCluster, namespace: str
) -> None:
    first = await cluster.apply(config_map(namespace, "applied", a="1"))
    second = config_map(namespace, "applied", b="2")
    second["metadata"]["uid"] = first["metadata"]["uid"]
    assert (await cluster.apply(second))["data"] == {"b": "2"}
    await cluster.delete(CONFIG_MAP, Key(namespace, "applied"), first["metadata"]["uid"])
    with pytest.raises(ConflictError):
        await cluster.apply(second)
    assert await cluster.read(CONFIG_MAP, Key(namespace, "applied")) is None


async def test_a_json_patch_whose_test_fails_is_a_conflict_and_one_of_nothing_is_none(
    cluster: KubernetesCluster, namespace: str
) -> None:
    key = Key(namespace, "patched")
    made = await cluster.create(config_map(namespace, key.name, a="1"))
    good = [
        {"op": "test", "path": "/metadata/uid", "value": made["metadata"]["uid"]},
        {"op": "test", "path": "/metadata/resourceVersion", "value": made["metadata"]["resourceVersion"]},
        {"op": "add", "path": "/data/a", "value": "2"},
    ]
    patched = await cluster.patch(CONFIG_MAP, key, good)
    assert patched is not None
    assert patched["data"] == {"a": "2"}
    with pytest.raises(ConflictError):
        await cluster.patch(CONFIG_MAP, key, good)
    assert await cluster.patch(CONFIG_MAP, Key(namespace, "absent"), good) is None


async def test_lists_select_by_label_value_and_by_presence_over_all_pages(
    cluster: KubernetesCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "PAGE", 2)
    for number in range(5):
        await cluster.create(config_map(namespace, f"listed-{number}", {"n": str(number), "odd": str(number % 2)}))
    names = [item["metadata"]["name"] for item in await cluster.list(CONFIG_MAP, namespace, {"n": ""})]
    assert names == [f"listed-{number}" for number in range(5)]
    found = await cluster.list(CONFIG_MAP, namespace, {"n": "", "odd": "1"})
    assert [(item["metadata"]["name"], item["kind"]) for item in found] == [
        ("listed-1", "ConfigMap"), ("listed-3", "ConfigMap"),
    ]  # fmt: skip
    async with connect(await load_configuration(), namespaces=(namespace, "default")) as narrow:
        assert len(await narrow.list(CONFIG_MAP, None, {"n": ""})) == 5


async def test_another_incarnation_is_not_deleted(cluster: KubernetesCluster, namespace: str) -> None:
    key = Key(namespace, "kept")
    made = await cluster.create(config_map(namespace, key.name))
    await cluster.delete(CONFIG_MAP, key, "00000000-0000-0000-0000-000000000000")
    assert await cluster.read(CONFIG_MAP, key) is not None
    await cluster.delete(CONFIG_MAP, key, made["metadata"]["uid"])
    await cluster.delete(CONFIG_MAP, key, made["metadata"]["uid"])
    assert await cluster.read(CONFIG_MAP, key) is None


async def test_equal_events_are_counted_and_others_stand_alone(cluster: KubernetesCluster, namespace: str) -> None:
    regarding = await cluster.create(config_map(namespace, "told"))
    for _ in range(3):
        await cluster.emit(regarding, "Restarting", "Infrastructure: S3 did not answer", warning=True)
    await cluster.emit(regarding, "Succeeded", "x" * 3000)
    found = await cluster.list(EVENT, namespace, {})
    mine = {event["reason"]: event for event in found if event["involvedObject"]["name"] == "told"}
    assert (mine["Restarting"]["count"], mine["Restarting"]["type"]) == (3, "Warning")
    assert (mine["Succeeded"]["count"], len(mine["Succeeded"]["message"])) == (1, 1024)


async def test_refusals_say_what_the_server_said(cluster: KubernetesCluster, namespace: str) -> None:
    with pytest.raises(InvalidError, match=r"metadata\.name"):
        await cluster.create(config_map(namespace, "Not_A_Name"))
    misspelt = {**config_map(namespace, "misspelt"), "imutable": True}
    with pytest.raises(InvalidError, match="imutable"):
        await cluster.create(misspelt)
    apply({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few", "namespace": namespace},
        "spec": {"hard": {"count/services": "0"}},
    })  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "one", "namespace": namespace},
        "spec": {"clusterIP": "None", "ports": [{"port": 1}]},
    }  # fmt: skip
    await eventually(lambda: "used" in get("resourcequota", "few", namespace).get("status", {}))
    with pytest.raises(ForbiddenError, match="exceeded quota"):
        await cluster.create(service)
    kubectl("-n", namespace, "delete", "resourcequota", "few")
    assert await cluster.list(SERVICE, namespace, {}) == []


# --- the operator ----------------------------------------------------------------------------------------------------


async def test_a_job_goes_through_a_restart_and_a_suspension_to_success(operator: Operator, namespace: str) -> None:
    name = "story"
    apply(tune(namespace, name))
    await reaches(namespace, name, "Starting", attempt=1)
    first = await live_pod(namespace, name, 1)
    play_kubelet(namespace, first, None)
    await reaches(namespace, name, "Running")
    play_kubelet(namespace, first, 69, json.dumps({"exitCode": 69, "message": "S3 did not answer"}))
    restarted = await reaches(namespace, name, "Starting", attempt=2)
    assert restarted["restarts"]["infrastructure"] == 1
    play_kubelet(namespace, await live_pod(namespace, name, 2), None)
    await reaches(namespace, name, "Running")
    kubectl("-n", namespace, "patch", "ftj", name, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    await reaches(namespace, name, "Suspended")
    assert get("job", name, namespace)["spec"]["suspend"] is True
    kubectl("-n", namespace, "patch", "ftj", name, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    await reaches(namespace, name, "Starting", attempt=3)
    last = await live_pod(namespace, name, 3)
    play_kubelet(namespace, last, None)
    await reaches(namespace, name, "Running")
    play_kubelet(namespace, last, 0, result_of(name))
    done = await reaches(namespace, name, "Succeeded")
    assert done["output"]["uri"] == f"s3://out/{name}/adapter"
    kubectl("-n", namespace, "wait", "--for=condition=Complete", f"ftj/{name}", "--timeout=10s")
    columns = kubectl("-n", namespace, "get", "ftj", name, "--no-headers").split()
    assert columns[:4] == [name, "LoRA", "Succeeded", "9/9"]
    events = {item["reason"] for item in items("events", "-n", namespace) if item["involvedObject"]["name"] == name}
    assert {"Restarting", "Succeeded"} <= events


async def test_bad_data_fails_with_file_and_line_and_its_log_is_kept(operator: Operator, namespace: str) -> None:
    name = "bad-data"
    apply(tune(namespace, name))
    pod = await live_pod(namespace, name, 1)
    play_kubelet(namespace, pod, 65, json.dumps({"exitCode": 65, "message": "s3://d/a.jsonl line 3 is cut"}))
    failed = await reaches(namespace, name, "Failed", reason="Data")
    assert failed["message"] == "s3://d/a.jsonl line 3 is cut"
    assert get("pod", pod, namespace)["status"]["phase"] == "Failed"


async def test_an_operator_killed_in_the_middle_goes_on_where_it_was(
    operator: Operator, namespace: str, kubeconfig: Path
) -> None:
    name = "killed"
    apply(tune(namespace, name))
    pod = await live_pod(namespace, name, 1)
    await reaches(namespace, name, "Starting")
    operator.stop(kill=True)
    play_kubelet(namespace, pod, 0, result_of(name))
    second = Operator(namespace, kubeconfig)
    try:
        await reaches(namespace, name, "Succeeded", attempt=1)
    finally:
        second.stop()


async def test_deleting_a_job_leaves_nothing(operator: Operator, namespace: str) -> None:
    name = "deleted"
    apply(tune(namespace, name))
    await live_pod(namespace, name, 1)
    kubectl("-n", namespace, "delete", "ftj", name, "--wait=true")

    def gone() -> bool:
        kinds = ("jobs", "pods", "configmaps", "services")
        return not any(items(kind, "-n", namespace, "-l", f"finetune.dev/job={name}") for kind in kinds)

    assert await eventually(gone)


async def test_a_manifest_that_the_server_refuses_fails_the_job_with_the_servers_words(
    operator: Operator, namespace: str
) -> None:
    name = "refused"
    # Nearly all of these the CRD refuses already.
    tolerations = [{"key": "spot", "operator": "Exists", "value": "must be empty then"}]
    apply(tune(namespace, name, scheduling={"schedulerName": "nobody", "tolerations": tolerations}))
    failed = await reaches(namespace, name, "Failed", reason="Usage")
    assert "spec.tolerations[2].operator" in failed["message"]


async def test_a_quota_that_forbids_the_pods_is_told(operator: Operator, namespace: str) -> None:
    apply({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small", "namespace": namespace},
        "spec": {"hard": {"requests.memory": "1Mi"}},
    })  # fmt: skip
    await eventually(lambda: "used" in get("resourcequota", "small", namespace).get("status", {}))
    apply(tune(namespace, "quota"))
    refused = await reaches(namespace, "quota", "Starting", reason="PodsRefused")
    assert "exceeded quota: small" in refused["message"]
    kubectl("-n", namespace, "delete", "resourcequota", "small")
    # Without an operator a namespace with a Job that runs could not be deleted.
    kubectl("-n", namespace, "delete", "ftj", "quota")


async def test_the_status_of_a_namesake_is_not_written_by_a_pass_over_its_predecessor(
    cluster: KubernetesCluster, namespace: str
) -> None:
    key = Key(namespace, "namesake")
    old = await cluster.create(tune(namespace, key.name, suspend=True))
    await cluster.delete(FINE_TUNE_JOB, key, old["metadata"]["uid"])
    await cluster.create(tune(namespace, key.name, suspend=True))
    patch = [
        {"op": "test", "path": "/metadata/uid", "value": old["metadata"]["uid"]},
        {"op": "add", "path": "/status", "value": {"phase": "Succeeded"}},
    ]
    with pytest.raises(ConflictError):
        await cluster.patch(FINE_TUNE_JOB, key, patch, subresource="status")
    assert await cluster.list(JOB, namespace, {"finetune.dev/job": key.name}) == []
    assert await cluster.list(POD, namespace, {"finetune.dev/job": key.name}) == []


@pytest.mark.timeout(400)
async def test_a_namespace_with_a_running_job_can_be_deleted() -> None:
    """The Role goes with the namespace; this operator has its permissions from outside, as one for all namespaces."""
    ends = f"operator-ends-{os.getpid()}"
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ends}})
    operator = Operator(ends, Path(os.environ["KUBECONFIG"]))
    try:
        apply(tune(ends, "running"))
        play_kubelet(ends, await live_pod(ends, "running", 1), None)
        await reaches(ends, "running", "Running")
        kubectl("delete", "namespace", ends, "--wait=true", "--timeout=180s", seconds=200)
    finally:
        operator.stop()
