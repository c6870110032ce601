"""The emulated Job controller keeps the rules of the real one that the product's restarts are built upon."""

from __future__ import annotations

import pytest
from tests.support.scripted import Clock, Node, ScriptedRuntime

from finetune_operator.cluster.kubelet import StartError
from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import JOB, POD, Key, Object

KEY = Key("default", "tune")
POLICY = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [64, 65]}},
    ]
}


class World:
    """One Job in a cluster, and what a test asks about it."""

    def __init__(self, completions: int = 1, stop_code: int | None = 75, suspend: bool = False) -> None:
        self.clock = Clock()
        self.cluster = MemoryCluster(clock=self.clock)
        self.runtime = ScriptedRuntime(stop_code)
        self.node = Node(self.cluster, self.clock, self.runtime)
        self.job = {
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tune"},
            "spec": {
                "completions": completions, "parallelism": completions, "completionMode": "Indexed", "suspend": suspend,
                "backoffLimitPerIndex": 2147483647, "podFailurePolicy": POLICY,
                "template": {
                    "metadata": {"labels": {"finetune.dev/job": "tune"}, "annotations": {"finetune.dev/attempt": "1"}},
                    "spec": {"containers": [{"name": "trainer"}], "terminationGracePeriodSeconds": 120},
                },
            },
        }  # fmt: skip

    async def start(self) -> World:
        self.job = await self.cluster.create(self.job)
        await self.node.settle()
        return self

    async def pods(self) -> list[Object]:
        return await self.cluster.list(POD, "default", {})

    async def phases(self) -> list[tuple[str, str]]:
        """Index and phase of each pod, in order."""
        pods = await self.pods()
        return sorted((pod["spec"]["hostname"], pod["status"]["phase"]) for pod in pods)

    async def status(self) -> Object:
        job = await self.cluster.read(JOB, KEY)
        assert job is not None
        status: Object = job["status"]
        return status

    async def conditions(self) -> dict[str, str]:
        return {item["type"]: item["status"] for item in (await self.status()).get("conditions", [])}

    async def end(self, index: int, code: int, message: str = "") -> float | None:
        for pod in await self.pods():
            if pod["spec"]["hostname"] == f"tune-{index}" and pod["status"]["phase"] == "Running":
                self.runtime.end(pod["metadata"]["name"], code, message)
        return await self.node.settle()

    async def set_suspend(self, suspend: bool, attempt: str | None = None) -> None:
        patch = [{"op": "replace", "path": "/spec/suspend", "value": suspend}]
        if attempt:
            path = "/spec/template/metadata/annotations/finetune.dev~1attempt"
            patch.append({"op": "replace", "path": path, "value": attempt})
        await self.cluster.patch(JOB, KEY, patch)
        await self.node.settle()


async def test_each_index_gets_a_pod_with_its_name_host_name_label_and_annotation() -> None:
    world = await World(completions=2).start()
    second = next(pod for pod in await world.pods() if pod["spec"]["hostname"] == "tune-1")
    metadata = second["metadata"]
    assert metadata["name"].startswith("tune-1-")
    assert metadata["labels"]["finetune.dev/job"] == "tune"
    assert metadata["labels"]["batch.kubernetes.io/job-name"] == "tune"
    assert metadata["labels"]["batch.kubernetes.io/job-completion-index"] == "1"
    assert metadata["annotations"]["batch.kubernetes.io/job-completion-index"] == "1"
    assert metadata["annotations"]["finetune.dev/attempt"] == "1"
    assert metadata["ownerReferences"][0]["uid"] == world.job["metadata"]["uid"]
    assert second["spec"]["containers"][0]["env"][0]["name"] == "JOB_COMPLETION_INDEX"
    assert second["status"]["podIP"].startswith("127.")
    assert (await world.status())["active"] == 2


async def test_a_job_is_complete_when_every_index_has_succeeded() -> None:
    world = await World(completions=2).start()
    await world.end(0, 0, "done")
    assert (await world.status())["completedIndexes"] == "0"
    assert "Complete" not in await world.conditions()
    await world.end(1, 0)
    status = await world.status()
    assert status["completedIndexes"] == "0-1"
    assert (status["succeeded"], status["active"]) == (2, 0)
    assert (await world.conditions())["Complete"] == "True"
    assert status["completionTime"] == "2026-01-01T12:00:00Z"


async def test_an_ended_pod_keeps_its_exit_code_and_termination_message() -> None:
    world = await World().start()
    await world.end(0, 64, '{"exitCode": 64}')
    (pod,) = await world.pods()
    terminated = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["exitCode"], terminated["message"], terminated["reason"]) == (64, '{"exitCode": 64}', "Error")


async def test_a_failed_pod_is_replaced_after_a_pause_that_doubles() -> None:
    world = await World().start()
    assert await world.end(0, 69) == 10
    world.clock.forward(9)
    assert await world.node.settle() == 1
    assert len(world.runtime.started) == 1
    world.clock.forward(1)
    await world.node.settle()
    assert len(world.runtime.started) == 2
    assert (await world.status())["failed"] == 1
    assert await world.end(0, 69) == 20
    world.clock.forward(20)
    await world.node.settle()
    assert len(world.runtime.started) == 3


async def test_the_pause_never_exceeds_ten_minutes() -> None:
    world = await World().start()
    for _ in range(9):
        world.clock.forward(await world.end(0, 69) or 0)
        await world.node.settle()
    assert await world.end(0, 69) == 600


async def test_an_index_fails_alone() -> None:
    world = await World(completions=2).start()
    await world.end(0, 69)
    assert await world.phases() == [("tune-0", "Failed"), ("tune-1", "Running")]


async def test_an_exit_code_that_is_never_retried_fails_the_job_after_its_other_pods_have_stopped() -> None:
    world = await World(completions=2, stop_code=None).start()
    await world.end(0, 64)
    conditions = await world.conditions()
    assert conditions["FailureTarget"] == "True"
    assert "Failed" not in conditions
    await world.end(1, 75)
    assert (await world.conditions())["Failed"] == "True"
    failed = next(item for item in (await world.status())["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert "Container trainer for pod default/tune-0-" in failed["message"]
    assert "exit code 64" in failed["message"]
    assert len(world.runtime.started) == 2


async def test_a_disruption_is_not_counted() -> None:
    world = await World().start()
    (pod,) = await world.pods()
    target = {"type": "DisruptionTarget", "status": "True"}
    world.cluster.set_status(POD, Key("default", pod["metadata"]["name"]), {"phase": "Failed", "conditions": [target]})
    await world.node.settle()
    world.clock.forward(10)
    await world.node.settle()
    assert (await world.status())["failed"] == 0
    assert len(world.runtime.started) == 2


async def test_suspension_stops_the_pods_gracefully_counts_nothing_and_clears_the_start_time() -> None:
    world = await World(completions=2, stop_code=None).start()
    assert (await world.status())["startTime"]
    await world.set_suspend(True)
    status = await world.status()
    assert set(world.runtime.stopped.values()) == {120.0}
    assert (status["active"], status["terminating"]) == (0, 2)
    assert "startTime" not in status
    assert (await world.conditions())["Suspended"] == "True"
    await world.end(0, 75)
    await world.end(1, 75)
    assert await world.pods() == []
    assert (await world.status())["failed"] == 0


async def test_a_resumed_job_starts_all_pods_at_once_with_the_new_attempt() -> None:
    world = await World(completions=2).start()
    await world.set_suspend(True)
    await world.set_suspend(False, attempt="2")
    pods = await world.pods()
    assert [pod["metadata"]["annotations"]["finetune.dev/attempt"] for pod in pods] == ["2", "2"]
    assert (await world.conditions())["Suspended"] == "False"
    assert (await world.status())["startTime"]


async def test_no_pod_is_made_while_its_predecessor_still_stops() -> None:
    world = await World(stop_code=None).start()
    await world.set_suspend(True)
    await world.set_suspend(False)
    assert len(world.runtime.started) == 1
    await world.end(0, 75)
    world.clock.forward(10)
    await world.node.settle()
    assert len(world.runtime.started) == 2


async def test_a_failed_pod_lasts_through_a_suspension_and_its_pause_too() -> None:
    world = await World().start()
    await world.end(0, 69)
    await world.set_suspend(True)
    (pod,) = await world.pods()
    await world.cluster.delete(POD, Key("default", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.node.settle()
    assert await world.phases() == [("tune-0", "Failed")]
    await world.set_suspend(False)
    assert len(world.runtime.started) == 1
    world.clock.forward(10)
    await world.node.settle()
    assert await world.phases() == [("tune-0", "Running")]


async def test_an_index_that_has_succeeded_is_not_run_again_after_a_suspension() -> None:
    world = await World(completions=2).start()
    await world.end(0, 0)
    await world.set_suspend(True)
    await world.set_suspend(False)
    assert sum(name.startswith("tune-0-") for name in world.runtime.started) == 1


async def test_a_job_that_is_created_suspended_has_no_pods() -> None:
    world = await World(suspend=True).start()
    assert await world.pods() == []
    assert "startTime" not in await world.status()


async def test_a_pod_that_somebody_deletes_counts_as_failed_and_is_replaced() -> None:
    world = await World().start()
    (pod,) = await world.pods()
    await world.cluster.delete(POD, Key("default", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.node.settle()
    world.clock.forward(10)
    await world.node.settle()
    assert len(world.runtime.started) == 2
    assert (await world.status())["failed"] == 1
    assert len(await world.pods()) == 1


async def test_a_pod_that_is_deleted_by_force_is_killed_and_replaced() -> None:
    world = await World(stop_code=None).start()
    (pod,) = await world.pods()
    world.cluster.release(Key("default", pod["metadata"]["name"]), "batch.kubernetes.io/job-tracking")
    await world.cluster.delete(POD, Key("default", pod["metadata"]["name"]), pod["metadata"]["uid"], 0)
    await world.node.settle()
    assert world.runtime.stopped == {pod["metadata"]["name"]: 0}
    assert len(world.runtime.started) == 2


async def test_a_pod_whose_deletion_is_hurried_is_stopped_again_with_less_time() -> None:
    world = await World(stop_code=None).start()
    (pod,) = await world.pods()
    key, uid = Key("default", pod["metadata"]["name"]), pod["metadata"]["uid"]
    await world.cluster.delete(POD, key, uid)
    await world.node.settle()
    await world.cluster.delete(POD, key, uid, 5)
    await world.node.settle()
    assert world.runtime.stopped == {pod["metadata"]["name"]: 5}


async def test_a_deleted_job_takes_its_pods_along() -> None:
    world = await World(completions=2).start()
    await world.cluster.delete(JOB, KEY, world.job["metadata"]["uid"])
    await world.node.settle()
    assert await world.pods() == []


async def test_a_container_that_cannot_start_waits_with_its_reason() -> None:
    world = World()
    world.runtime.refuse = StartError("CreateContainerConfigError", "no such secret")
    await world.start()
    (pod,) = await world.pods()
    waiting = pod["status"]["containerStatuses"][0]["state"]["waiting"]
    assert waiting == {"reason": "CreateContainerConfigError", "message": "no such secret"}
    assert pod["status"]["phase"] == "Pending"
    await world.set_suspend(True)
    assert await world.pods() == []


async def test_pods_of_a_program_that_was_killed_count_as_disrupted() -> None:
    world = await World().start()
    after_the_kill = Node(world.cluster, world.clock, ScriptedRuntime())
    await after_the_kill.settle()
    (pod,) = await world.pods()
    assert pod["status"]["phase"] == "Failed"
    assert pod["status"]["conditions"][0]["type"] == "DisruptionTarget"
    world.clock.forward(10)
    await after_the_kill.settle()
    assert await world.phases() == [("tune-0", "Failed"), ("tune-0", "Running")]


@pytest.mark.parametrize("code", [1, 70, 79, 137])
async def test_other_exit_codes_are_retried(code: int) -> None:
    world = await World().start()
    assert await world.end(0, code) == 10
    assert "FailureTarget" not in await world.conditions()
