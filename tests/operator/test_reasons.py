"""What a person is told when a job does not run: the phase, a word, and the sentence of whoever knows why."""

from __future__ import annotations

import json

import pytest

from finetune_operator.cluster.kubelet import StartError
from finetune_operator.cluster.port import EVENT, POD, JsonPatch, Key
from tests.operator.world import World, admit_all
from tests.support.scripted import ScriptedRuntime

WAITING = {
    "ImagePullBackOff": 'Back-off pulling image "registry.example/trainer:1"',
    "CreateContainerConfigError": 'secret "s3-keys" not found',
    "CreateContainerError": "device is gone",
}


@pytest.mark.parametrize("reason", WAITING)
async def test_a_container_that_cannot_start_says_why_in_status(reason: str) -> None:
    runtime = ScriptedRuntime()
    runtime.refuse = StartError(reason, WAITING[reason])
    world = World(runtime=runtime, admit=admit_all)
    await world.create()
    await world.settle()
    assert await world.phase() == ("Starting", reason)
    assert WAITING[reason] in (await world.status())["message"]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("Unschedulable", "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."),
        ("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates"),
    ],
)
async def test_a_pod_without_a_node_says_what_is_wanting(reason: str, text: str) -> None:
    world = World(admit=admit_all)
    await world.create()
    await world.pass_once()
    await world.node.jobs.sync()
    (pod,) = await world.pods()
    unplaced = {"type": "PodScheduled", "status": "False", "reason": reason, "message": text}
    patch: JsonPatch = [{"op": "add", "path": "/status/conditions", "value": [unplaced]}]
    await world.cluster.patch(POD, Key("ml", pod["metadata"]["name"]), patch, "status")
    await world.pass_once()
    assert await world.phase() == ("Starting", reason)
    assert text in (await world.status())["message"]
    assert (await world.conditions())["Scheduled"] == "False"


async def test_a_volume_that_cannot_be_mounted_is_told_in_the_words_of_the_kubelets_event() -> None:
    world = World(admit=admit_all)
    await world.create()
    await world.pass_once()
    await world.node.jobs.sync()
    (pod,) = await world.pods()
    since = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}
    patch: JsonPatch = [{"op": "add", "path": "/status/conditions", "value": [since]}]
    await world.cluster.patch(POD, Key("ml", pod["metadata"]["name"]), patch, "status")
    text = 'MountVolume.SetUp failed for volume "ca-bundle": configmap "my-ca" not found'
    await world.cluster.emit(pod, "FailedMount", text, warning=True)
    await world.pass_once()
    assert await world.phase() == ("Starting", "PodsStarting")
    world.clock.forward(30)
    await world.pass_once()
    assert await world.phase() == ("Starting", "FailedMount")
    assert text in (await world.status())["message"]


async def test_a_quota_is_told_in_the_words_of_the_job_controllers_event() -> None:
    world = World(admit=admit_all)
    await world.create()
    await world.pass_once()
    text = 'Error creating: pods "tune-0-" is forbidden: exceeded quota: gpus, requested: 8, used: 16, limited: 16'
    await world.cluster.emit(await world.workload(), "FailedCreate", text, warning=True)
    await world.job_is_taken_up()
    # Events are dear: they are asked for when the pods are overdue.
    world.clock.forward(30)
    await world.pass_once()
    assert await world.phase() == ("Starting", "PodsRefused")
    assert text in (await world.status())["message"]
    assert len(await world.cluster.list(EVENT, "ml", {})) == 1


@pytest.mark.parametrize(
    ("code", "how", "reason", "words"),
    [
        (137, "OOMKilled", "OutOfMemory", "raise resources.memory"),
        (79, "", "OutOfMemory", "halve hyperparameters.perDeviceBatchSize"),
        (77, "", "Permission", "403 Forbidden for s3://data"),
        (65, "", "Data", "train.jsonl:3"),
    ],
)
async def test_what_ended_a_job_is_told_with_the_way_out(code: int, how: str, reason: str, words: str) -> None:
    said = {
        79: {"message": "CUDA out of memory", "advice": "halve hyperparameters.perDeviceBatchSize"},
        77: {"message": "403 Forbidden for s3://data", "advice": "check the Secret"},
        65: {"message": "train.jsonl:3: not JSON", "advice": "mend the line"},
    }.get(code)
    world = World(admit=admit_all)
    await world.create()
    await world.settle()
    await world.end(code, json.dumps({"exitCode": code, **said}) if said else "", how)
    await world.settle()
    assert await world.phase() == ("Failed", reason)
    assert words in (await world.status())["message"]
