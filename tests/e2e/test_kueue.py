"""Jobs in the queues of a real Kueue. No image is pulled and nothing trains, as in test_operator_api: the pods name a
scheduler that does not exist, and the test plays the kubelet."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.cluster import Object, apply, get, items, kubectl, kubectl_program, status_of
from tests.e2e.operating import Operator, eventually, play_kubelet, reaches, result_of, tune

NODES = 2
IMPORTANT = "kueue-test-important"
WORKLOADS = "workloads.kueue.x-k8s.io"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def kueue() -> None:
    """A cluster that has it; anything else is none of these tests' business."""
    command = [kubectl_program(), "get", "--raw", "/apis/kueue.x-k8s.io/v1beta1"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        pytest.skip("needs Kueue: the cluster serves no kueue.x-k8s.io/v1beta1")


@pytest.fixture(scope="module")
def team(kueue: None, namespace: str) -> Iterator[str]:
    """The namespace, with a LocalQueue called team that has room for one gang at a time."""
    apply(*cluster_queue(namespace), local_queue(namespace, "team"), priority_class())
    kubectl("-n", namespace, "wait", "--for=condition=Active", "localqueue/team", "--timeout=30s")
    yield namespace
    kubectl("-n", namespace, "delete", "localqueue", "--all", "--timeout=60s", seconds=90)
    kubectl("delete", "clusterqueue", namespace, "--timeout=60s", seconds=90)
    kubectl("delete", "resourceflavor", namespace, "--timeout=60s", seconds=90)
    kubectl("delete", "priorityclass", IMPORTANT)


@pytest.fixture(autouse=True)
def all_leave_the_queue(team: str) -> Iterator[None]:
    yield
    kubectl("-n", team, "delete", "ftj", "--all", "--wait=true", "--timeout=60s", seconds=90)
    kubectl("-n", team, "wait", "--for=delete", WORKLOADS, "--all", "--timeout=60s", seconds=90)


def cluster_queue(name: str) -> list[Object]:
    """One that has two GPUs and lets the more important go first, and the flavor of these GPUs."""
    quota = {"nvidia.com/gpu": str(NODES), "cpu": "10", "memory": "10Gi"}
    resources = [{"name": resource, "nominalQuota": amount} for resource, amount in quota.items()]
    group = {"coveredResources": list(quota), "flavors": [{"name": name, "resources": resources}]}
    # As many have them, which puts them into the Job's template: the nodes that have these GPUs keep others out.
    only = {"key": "gpu-pool", "operator": "Equal", "value": "a", "effect": "NoSchedule"}
    flavor = {"nodeLabels": {"gpu-pool": "a"}, "tolerations": [only]}
    return [
        {**kueue_object("ResourceFlavor", name), "spec": flavor},
        {
            **kueue_object("ClusterQueue", name),
            "spec": {
                "namespaceSelector": {}, "resourceGroups": [group],
                "preemption": {"withinClusterQueue": "LowerPriority"},
            },
        },
    ]  # fmt: skip


def local_queue(namespace: str, name: str) -> Object:
    queue = kueue_object("LocalQueue", name)
    queue["metadata"]["namespace"] = namespace
    return {**queue, "spec": {"clusterQueue": namespace}}


def kueue_object(kind: str, name: str) -> Object:
    return {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": kind, "metadata": {"name": name}}


def priority_class() -> Object:
    return {
        "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": IMPORTANT}, "value": 1000,
        "preemptionPolicy": "Never",
    }  # fmt: skip


def gang(namespace: str, name: str, scheduling: Object | None = None, **policy: Any) -> Object:
    """Two pods with a GPU each, which is all that there is in the queue."""
    resources = {"nodes": NODES, "gpusPerNode": 1, "cpu": "10m", "memory": "64Mi", "scratch": "1Gi"}
    queue = {"queue": "team", "schedulerName": "nobody", **(scheduling or {})}
    return tune(
        namespace, name, resources=resources, scheduling=queue, runPolicy={"preflight": "Never", **policy},
        hyperparameters={"gradientAccumulationSteps": 1},
    )  # fmt: skip


def pods(namespace: str, name: str) -> list[Object]:
    """Those that have not ended, lowest index first."""
    found = items("pods", "-n", namespace, "-l", f"finetune.dev/job={name}")
    alive = (pod for pod in found if pod["status"]["phase"] in ("Pending", "Running"))
    return sorted(alive, key=lambda pod: str(pod["metadata"]["name"]))


async def whole_gang(namespace: str, name: str, attempt: int) -> list[str]:
    """The names of its pods, when all of this attempt and none of another are there."""

    def find() -> list[str] | None:
        found = [(pod["metadata"]["name"], pod["metadata"]["annotations"]) for pod in pods(namespace, name)]
        numbers = [annotations["finetune.dev/attempt"] for _, annotations in found]
        return [pod for pod, _ in found] if numbers == [str(attempt)] * NODES else None

    names: list[str] = await eventually(find)
    return names


async def running(namespace: str, name: str, attempt: int = 1) -> list[str]:
    """The same, made to run, and seen by the operator to do so."""
    names = await whole_gang(namespace, name, attempt)
    for pod in names:
        play_kubelet(namespace, pod, None)
    now = await reaches(namespace, name, "Running", attempt=attempt)
    assert admitted(now) == "True"
    return names


async def succeed(namespace: str, name: str, pods: list[str]) -> None:
    for pod in pods:
        play_kubelet(namespace, pod, 0, result_of(name))
    await reaches(namespace, name, "Succeeded")


def admitted(now: Object) -> str:
    found = {item["type"]: item["status"] for item in now["conditions"]}
    return str(found["Admitted"])


def events_of(namespace: str, name: str) -> list[str]:
    found = items("events", "-n", namespace, "--field-selector", f"involvedObject.name={name}")
    return [f"{event['reason']}: {event['message']}" for event in found]


def workload_of(namespace: str, name: str) -> Object | None:
    """What Kueue has made of the Job."""
    found = items(WORKLOADS, "-n", namespace)
    owned = (item for item in found if item["metadata"]["ownerReferences"][0]["name"] == name)
    return next(owned, None)


def last_to_suspend(namespace: str, name: str) -> str:
    """Who has written the Job's suspend last."""
    text = kubectl("-n", namespace, "get", "job", name, "-o", "json", "--show-managed-fields")
    fields = json.loads(text)["metadata"]["managedFields"]
    (manager,) = [item["manager"] for item in fields if "f:suspend" in item["fieldsV1"].get("f:spec", {})]
    return str(manager)


async def left_nothing(namespace: str, name: str) -> None:
    def gone() -> bool:
        kinds = ("jobs", "pods", "configmaps", "services")
        children = [items(kind, "-n", namespace, "-l", f"finetune.dev/job={name}") for kind in kinds]
        return not any(children) and workload_of(namespace, name) is None

    await eventually(gone)


def delete(namespace: str, name: str) -> None:
    kubectl("-n", namespace, "delete", "ftj", name, "--wait=true")


def suspend(namespace: str, name: str, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    kubectl("-n", namespace, "patch", "ftj", name, "--type=merge", "-p", patch)


async def test_a_gang_waits_for_room_and_is_let_in_as_a_whole(operator: Operator, team: str) -> None:
    apply(gang(team, "first"))
    await whole_gang(team, "first", 1)
    assert admitted(await reaches(team, "first", "Starting")) == "True"
    assert last_to_suspend(team, "first") == "kueue"
    apply(gang(team, "second"))
    waiting = await reaches(team, "second", "Queued")
    assert (waiting["message"], admitted(waiting)) == ("Waiting in queue team", "False")
    await eventually(lambda: workload_of(team, "second"))
    apply(gang(team, "never"))
    await reaches(team, "never", "Queued")
    await eventually(lambda: workload_of(team, "never"))
    # One that waits takes its place in the queue along.
    delete(team, "never")
    await left_nothing(team, "never")
    assert pods(team, "second") == []
    await succeed(team, "first", await running(team, "first"))
    await whole_gang(team, "second", 1)
    # One that was let in makes room again.
    delete(team, "second")
    await left_nothing(team, "second")
    assert workload_of(team, "first") is not None
    delete(team, "first")
    await left_nothing(team, "first")


async def test_a_pod_that_fails_or_is_taken_away_starts_the_gang_again_in_its_place(
    operator: Operator, team: str
) -> None:
    name = "restarted"
    apply(gang(team, name))
    names = await running(team, name)
    place, job = workload_of(team, name), get("job", name, team)
    assert place is not None
    play_kubelet(team, names[1], 69, json.dumps({"exitCode": 69, "message": "S3 did not answer"}))
    names = await running(team, name, 2)
    kubectl("-n", team, "delete", "pod", names[0], "--wait=false")
    await running(team, name, 3)
    now, kept = status_of(team, name), workload_of(team, name)
    assert (now["restarts"]["infrastructure"], now["restarts"]["disruption"], now["restarts"]["total"]) == (1, 1, 2)
    assert kept is not None
    assert kept["metadata"]["uid"] == place["metadata"]["uid"]
    assert get("job", name, team)["metadata"]["uid"] == job["metadata"]["uid"]
    assert last_to_suspend(team, name) == "kueue"


async def test_a_more_important_gang_takes_the_place_of_another(operator: Operator, team: str) -> None:
    name, attempt = "modest", 1
    apply(gang(team, name))
    names = await running(team, name)
    place = workload_of(team, name)
    assert place is not None
    for times in (1, 2):
        if times == 2:
            # A number that Kueue did not see when it first saw the Job.
            play_kubelet(team, names[0], 69, json.dumps({"exitCode": 69, "message": "S3 did not answer"}))
            attempt += 1
            await running(team, name, attempt)
        apply(gang(team, f"important-{times}", {"priorityClassName": IMPORTANT}))
        others = await running(team, f"important-{times}")
        now = await reaches(team, name, "Queued", attempt=attempt + 1)
        assert (now["restarts"]["disruption"], now["restarts"]["total"]) == (times, 2 * times - 1)
        assert (now["message"], admitted(now)) == ("Waiting in queue team", "False")
        assert pods(team, name) == []
        await succeed(team, f"important-{times}", others)
        attempt += 1
        names = await running(team, name, attempt)
        assert last_to_suspend(team, name) == "kueue"
    told = [text for text in events_of(team, name) if text.startswith("Restarting: Disruption")]
    assert told
    assert all("Queue team took the job back: Preempted to accommodate a workload" in text for text in told)
    kept = workload_of(team, name)
    assert kept is not None
    assert kept["metadata"]["uid"] == place["metadata"]["uid"]
    await succeed(team, name, names)


async def test_a_user_who_suspends_gives_the_place_back_and_queues_anew(operator: Operator, team: str) -> None:
    apply(gang(team, "paused"))
    await running(team, "paused")
    apply(gang(team, "next"))
    await reaches(team, "next", "Queued")
    suspend(team, "paused", True)
    await reaches(team, "paused", "Suspended")
    await left_nothing_in_the_queue(team, "paused")
    others = await running(team, "next")
    suspend(team, "paused", False)
    now = await reaches(team, "paused", "Queued")
    assert now["restarts"]["total"] == 0
    await succeed(team, "next", others)
    await running(team, "paused", 2)


async def left_nothing_in_the_queue(namespace: str, name: str) -> None:
    await eventually(lambda: workload_of(namespace, name) is None and pods(namespace, name) == [])


async def test_a_job_that_fails_for_good_leaves_the_queue(operator: Operator, team: str) -> None:
    apply(gang(team, "hopeless", retries={"infrastructure": 0}))
    names = await running(team, "hopeless")
    apply(gang(team, "after"))
    await reaches(team, "after", "Queued")
    play_kubelet(team, names[0], 69, json.dumps({"exitCode": 69, "message": "S3 did not answer"}))
    await reaches(team, "hopeless", "Failed", reason="Infrastructure")
    await left_nothing_in_the_queue(team, "hopeless")
    names = await running(team, "after")
    # Here the Job itself has failed, and stays with the pod that explains it; its place is free nevertheless.
    apply(gang(team, "last"))
    await reaches(team, "last", "Queued")
    play_kubelet(team, names[0], 65, json.dumps({"exitCode": 65, "message": "s3://d/a.jsonl line 3 is cut"}))
    await reaches(team, "after", "Failed", reason="Data")
    await whole_gang(team, "last", 1)


@pytest.fixture
def managed(team: str) -> str:
    """Where Kueue takes care of Jobs that name no queue."""
    container = {"name": "c", "image": "example.invalid/none:1"}
    probe = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "namespace": team},
        "spec": {"suspend": False, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }  # fmt: skip
    if not json.loads(kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=probe))["spec"]["suspend"]:
        pytest.skip("needs a Kueue with manageJobsWithoutQueueName")
    return team


def without_queue(namespace: str, name: str, **policy: Any) -> Object:
    job = gang(namespace, name, **policy)
    del job["spec"]["scheduling"]["queue"]
    return job


async def test_a_job_without_a_queue_is_resumed_once_and_a_label_helps_it(operator: Operator, managed: str) -> None:
    apply(without_queue(managed, "stray", preflight="Always"))
    now = await reaches(managed, "stray", "Queued", reason="NoQueue")
    assert (now["attempt"], now["restarts"]["total"], admitted(now)) == (2, 0, "False")
    assert (
        "somebody has suspended its Job"
        in next(item for item in now["conditions"] if item["type"] == "Valid")["message"]
    )
    changes = get("job", "stray", managed)["metadata"]["generation"]
    for look in range(10):
        kubectl("-n", managed, "annotate", "ftj", "stray", "--overwrite", f"look={look}")
        assert get("job", "stray", managed)["metadata"]["generation"] == changes
    kubectl("-n", managed, "label", "job", "stray", "kueue.x-k8s.io/queue-name=team")
    await running(managed, "stray", 2)
    assert status_of(managed, "stray")["restarts"]["total"] == 0


async def test_a_default_queue_takes_a_job_that_is_suspended_and_goes_on(operator: Operator, managed: str) -> None:
    apply(without_queue(managed, "early"))
    await reaches(managed, "early", "Queued", reason="NoQueue")
    apply(local_queue(managed, "default"))
    kubectl("-n", managed, "wait", "--for=condition=Active", "localqueue/default", "--timeout=30s")
    suspend(managed, "early", True)
    await reaches(managed, "early", "Suspended")
    suspend(managed, "early", False)
    await running(managed, "early", 3)
    # One that comes later is put into that queue at once, its check first.
    apply(without_queue(managed, "late"), without_queue(managed, "checked", preflight="Always"))
    waiting = await reaches(managed, "late", "Queued")
    assert waiting["message"] == "Waiting in queue default"
    await reaches(managed, "checked", "Preflight")
    check = get("job", "checked-preflight", managed)
    assert check["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "default"
    await eventually(lambda: not get("job", "checked-preflight", managed)["spec"]["suspend"])
