"""Limits of time, and when a job that has ended goes: none of them begins anew, whoever restarts."""

from __future__ import annotations

import json

import pytest

from finetune_operator.cluster.kubelet import StartError
from finetune_operator.cluster.port import CONFIG_MAP, FINE_TUNE_JOB, JOB, POD, SERVICE, JsonPatch, Key
from finetune_operator.lifecycle.decision import TEARDOWN_SECONDS
from tests.operator.world import KEY, RESULT, World, admit_all
from tests.support.scripted import ScriptedRuntime

UNSCHEDULABLE = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."


async def started(**policy: int) -> World:
    world = World(admit=admit_all)
    await world.create(runPolicy=policy)
    await world.settle()
    assert (await world.phase())[0] == "Running"
    return world


async def waiting(**policy: int) -> World:
    """A pod for which there is no room."""
    world = World(admit=admit_all)
    world.node.kubelet.sync = nothing  # type: ignore[method-assign]
    await world.create(runPolicy=policy)
    await world.settle()
    (pod,) = await world.pods()
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNSCHEDULABLE}
    patch: JsonPatch = [{"op": "add", "path": "/status/conditions", "value": [unplaced]}]
    await world.cluster.patch(POD, Key("ml", pod["metadata"]["name"]), patch, "status")
    await world.settle()
    assert await world.phase() == ("Starting", "Unschedulable")
    return world


async def nothing() -> None:
    """A cluster without nodes."""


async def set_policy(world: World, **policy: int) -> None:
    await world.cluster.patch(FINE_TUNE_JOB, KEY, [{"op": "add", "path": "/spec/runPolicy", "value": policy}])


async def restart_operator(world: World) -> None:
    world.engine = world.operator(world.cluster)
    await world.settle()


# --- running ---------------------------------------------------------------------------------------------------------


async def test_a_job_that_runs_for_too_long_is_stopped_and_fails() -> None:
    world = await started(activeDeadlineSeconds=100)
    world.clock.forward(99)
    await world.settle()
    assert (await world.phase())[0] == "Running"
    world.clock.forward(1)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
    assert status["message"] == (
        "It ran for 1m40s (runPolicy.activeDeadlineSeconds) and did not come to its end. Advice: raise "
        "runPolicy.activeDeadlineSeconds in time, which a running job heeds"
    )
    assert status["activeSeconds"] == 100
    assert await world.pods() == []


async def test_only_time_of_running_counts_and_it_adds_up_over_attempts_and_operators() -> None:
    world = await started(activeDeadlineSeconds=100)
    world.clock.forward(40)
    await restart_operator(world)
    await world.set_suspend(True)
    await world.settle()
    world.clock.forward(10_000)
    await world.set_suspend(False)
    await world.settle()
    world.clock.forward(40)
    await world.settle()
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    await restart_operator(world)
    world.clock.forward(19)
    await world.settle()
    assert ((await world.phase())[0], (await world.status())["attempt"]) == ("Running", 3)
    world.clock.forward(1)
    await world.settle()
    assert await world.phase() == ("Failed", "DeadlineExceeded")


async def test_the_next_look_is_due_when_the_time_is_over() -> None:
    world = await started(activeDeadlineSeconds=103)
    world.clock.forward(100)
    assert await world.pass_once() == 3.0


async def test_a_deadline_that_is_raised_in_time_is_heeded() -> None:
    world = await started(activeDeadlineSeconds=100)
    world.clock.forward(99)
    await set_policy(world, activeDeadlineSeconds=200)
    world.clock.forward(50)
    await world.settle()
    assert (await world.phase())[0] == "Running"


async def test_a_result_that_came_in_time_counts_although_the_operator_looks_too_late() -> None:
    world = await started(activeDeadlineSeconds=100)
    await world.end(0, json.dumps(RESULT))
    world.clock.forward(1000)
    await world.settle()
    assert (await world.phase())[0] == "Succeeded"


async def test_a_teardown_after_the_time_is_over_is_waited_for_with_pauses() -> None:
    world = await hanging(activeDeadlineSeconds=100)
    world.clock.forward(100)
    await world.settle()
    world.clock.forward(1)
    assert await world.phase() == ("Running", "DeadlineExceeded")
    assert await world.pass_once() == TEARDOWN_SECONDS


# --- starting --------------------------------------------------------------------------------------------------------


async def test_a_job_that_finds_no_room_fails_in_time_and_says_for_want_of_what() -> None:
    world = await waiting(startDeadlineSeconds=3600)
    world.clock.forward(1800)
    await restart_operator(world)
    assert (await world.phase())[0] == "Starting"
    world.clock.forward(1800)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
    assert "did not all run within 1h0m (runPolicy.startDeadlineSeconds): 1 of 1 pods cannot be" in status["message"]
    assert UNSCHEDULABLE in status["message"]
    assert await world.pods() == []


async def test_a_pod_that_is_evicted_while_it_waits_does_not_begin_the_time_anew() -> None:
    world = await waiting(startDeadlineSeconds=3600)
    world.clock.forward(3000)
    (pod,) = await world.pods()
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    world.clock.forward(600)
    await world.settle()
    assert await world.phase() == ("Failed", "DeadlineExceeded")


async def hanging(**policy: int) -> World:
    """A pod that runs and does not stop when it is told to."""
    world = World(runtime=ScriptedRuntime(None), admit=admit_all)
    await world.create(runPolicy=policy)
    await world.settle()
    assert (await world.phase())[0] == "Running"
    return world


async def test_old_pods_that_hold_up_a_restart_count_as_waiting_and_the_end_waits_for_them() -> None:
    world = await hanging(startDeadlineSeconds=10)
    (pod,) = await world.pods()
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    world.clock.forward(9)
    await world.settle()
    assert await world.phase() == ("Restarting", "Disruption")
    assert await world.pass_once() == 1.0
    world.clock.forward(1)
    await world.settle()
    assert await world.phase() == ("Restarting", "DeadlineExceeded")
    await world.end(75)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"], status["attempt"]) == ("Failed", "DeadlineExceeded", 1)
    assert "did not all run within 10s (runPolicy.startDeadlineSeconds)" in status["message"]
    assert status["restarts"]["total"] == 1


async def test_a_job_that_is_suspended_while_it_restarts_is_not_late() -> None:
    world = await hanging(startDeadlineSeconds=10)
    (pod,) = await world.pods()
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    await world.set_suspend(True)
    world.clock.forward(10)
    await world.settle()
    await world.end(75)
    await world.settle()
    assert await world.phase() == ("Suspended", "Suspended")


async def test_old_pods_that_hold_up_a_job_that_goes_on_count_as_waiting() -> None:
    world = await hanging(startDeadlineSeconds=10)
    await world.set_suspend(True)
    await world.settle()
    world.clock.forward(20)
    await world.set_suspend(False)
    await world.settle()
    assert await world.phase() == ("Starting", "WaitingForOldPods")
    world.clock.forward(10)
    await world.settle()
    assert await world.phase() == ("Starting", "DeadlineExceeded")
    await world.end(75)
    await world.settle()
    assert await world.phase() == ("Failed", "DeadlineExceeded")


async def test_a_job_whose_time_of_running_is_over_is_not_started_again() -> None:
    world = await started(activeDeadlineSeconds=100)
    world.clock.forward(99)
    await world.end(75)
    world.clock.forward(1)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"], status["attempt"]) == ("Failed", "DeadlineExceeded", 1)


async def test_running_and_suspension_end_the_time_of_waiting() -> None:
    world = await started(startDeadlineSeconds=100)
    world.clock.forward(1000)
    await world.settle()
    await world.set_suspend(True)
    await world.settle()
    world.clock.forward(1000)
    await world.settle()
    await world.set_suspend(False)
    await world.settle()
    assert (await world.phase())[0] == "Running"
    assert "waitingSince" not in await world.status()


# --- after the end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 65])
async def test_a_job_that_has_ended_is_deleted_with_its_children_when_its_time_is_over(code: int) -> None:
    world = await started(ttlSecondsAfterFinished=600)
    await world.end(code, json.dumps(RESULT | {"exitCode": code}))
    await world.settle()
    assert await world.pass_once() == 600.0
    world.clock.forward(599)
    await world.pass_once()
    assert await world.cluster.read(FINE_TUNE_JOB, KEY) is not None
    world.clock.forward(1)
    assert await world.pass_once() is None
    await world.node.settle()
    for kind in (FINE_TUNE_JOB, JOB, CONFIG_MAP, SERVICE, POD):
        assert await world.cluster.list(kind, None, {}) == []


async def test_it_is_deleted_exactly_once_after_the_operator_was_away() -> None:
    world = await started(ttlSecondsAfterFinished=600)
    await world.end(0, json.dumps(RESULT))
    await world.settle()
    gone: list[str] = []
    world.cluster.subscribe(lambda change: gone.append(change.kind.kind) if change.type == "DELETED" else None)
    world.clock.forward(86_400)
    engine = world.operator(world.cluster)
    for _ in range(2):
        await engine.resync()
        while (key := engine.queue.take()) is not None:
            engine.queue.done(key, await engine.reconciler.reconcile(key))
    assert gone.count("FineTuneJob") == 1
    # A namesake that is made meanwhile is another job.
    await world.create()
    await world.settle()
    assert (await world.phase())[0] == "Running"


async def test_without_a_limit_a_job_that_has_ended_stays() -> None:
    world = await started()
    await world.end(0, json.dumps(RESULT))
    await world.settle()
    world.clock.forward(10**8)
    assert await world.pass_once() is None
    assert (await world.phase())[0] == "Succeeded"


# --- deletion in every phase -----------------------------------------------------------------------------------------


async def to_blocked(world: World) -> None:
    await world.create(model={"uri": "job://other"})


async def to_starting(world: World) -> None:
    world.node.runtime.refuse = StartError("ImagePullBackOff", "no such image")
    await world.create()


async def to_running(world: World) -> None:
    await world.create()


async def to_restarting(world: World) -> None:
    await world.create()
    await world.settle()
    (pod,) = await world.pods()
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])


async def to_suspended(world: World) -> None:
    await world.create(suspend=True)


async def to_succeeded(world: World) -> None:
    await world.create()
    await world.settle()
    await world.end(0, json.dumps(RESULT))


async def to_failed(world: World) -> None:
    await world.create()
    await world.settle()
    await world.end(65)


PHASES = {
    "Blocked": to_blocked,
    "Starting": to_starting,
    "Running": to_running,
    "Restarting": to_restarting,
    "Suspended": to_suspended,
    "Succeeded": to_succeeded,
    "Failed": to_failed,
}


@pytest.mark.parametrize("phase", PHASES)
async def test_a_job_can_be_deleted_in_phase(phase: str) -> None:
    world = World(runtime=ScriptedRuntime(None if phase == "Restarting" else 75), admit=admit_all)
    await PHASES[phase](world)
    await world.settle()
    assert (await world.phase())[0] == phase
    job = await world.cluster.read(FINE_TUNE_JOB, KEY)
    assert job is not None
    await world.cluster.delete(FINE_TUNE_JOB, KEY, job["metadata"]["uid"])
    assert await world.pass_once() is None
    for pod in await world.pods():
        world.node.runtime.end(pod["metadata"]["name"], 75)
    await world.node.settle()
    assert await world.pass_once() is None
    for kind in (FINE_TUNE_JOB, JOB, CONFIG_MAP, SERVICE, POD):
        assert await world.cluster.list(kind, None, {}) == []
