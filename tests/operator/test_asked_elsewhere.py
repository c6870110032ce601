"""What users of other operators missed or met, by the number of their issue; see docs/design-decisions.md.

Most of it is proven by tests beside what it is about. Here is what belongs to several parts at once.
"""

from __future__ import annotations

import json

import pytest

from finetune_api.contract import LABEL_QUEUE
from finetune_operator.cluster.port import JOB, POD, ClusterError, Key, Kind, Object
from tests.operator.test_queueing import QueuedWorld, Recording, come_back, running
from tests.operator.world import KEY, RESULT, World, admit_all
from tests.support.scripted import NO_ROOM, ScriptedRuntime

GANG: Object = {"resources": {"nodes": 3}}


async def gang(runtime: ScriptedRuntime | None = None, **policy: object) -> World:
    world = World(runtime=runtime, admit=admit_all)
    await world.create(**GANG, runPolicy={"preflight": "Never", **policy})
    await world.settle()
    assert await world.phase() == ("Running", "Running")
    return world


async def end_one(world: World, code: int) -> None:
    """One rank ends by itself; the others do not."""
    world.node.runtime.end((await world.pods())[1]["metadata"]["name"], code)
    await world.node.settle()
    await world.settle()


class Stubborn:
    """Passes calls on to a cluster, which answers no change of a Job while `refuses` is true."""

    def __init__(self, world: World) -> None:
        self._inner = world.cluster
        self.refuses = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def patch(self, kind: Kind, key: Key, patch: list[Object], subresource: str | None = None) -> Object | None:
        if kind == JOB and self.refuses:
            raise ClusterError("the server is currently unable to handle the request")
        return await self._inner.patch(kind, key, patch, subresource)


class DefaultQueue(Recording):
    """What Kueue's webhook does to a new Job where the namespace has a queue called default."""

    async def create(self, obj: Object) -> Object:
        if obj["kind"] == JOB.kind:
            labels = {LABEL_QUEUE: "default", **obj["metadata"]["labels"]}
            obj = {**obj, "metadata": {**obj["metadata"], "labels": labels}, "spec": {**obj["spec"], "suspend": True}}
        return await self._world.cluster.create(obj)


# --- the end frees what was taken ------------------------------------------------------------------------------------


async def test_a_gang_that_lost_one_pod_for_good_gives_all_its_gpus_back_before_it_is_called_failed() -> None:
    """kubeflow/trainer#1579: the master of a failed job kept its GPU."""
    world = await gang(ScriptedRuntime(stop_code=None))
    await end_one(world, 70)
    assert (await world.phase())[0] == "Running"
    assert (await world.workload())["spec"]["suspend"] is True
    for left in await world.pods():
        assert left["metadata"]["deletionTimestamp"]
        assert (await world.phase())[0] != "Failed"
        world.node.runtime.end(left["metadata"]["name"], 75)
        await world.node.settle()
        await world.settle()
    assert await world.phase() == ("Failed", "Application")
    assert await world.pods() == []


async def test_a_deadline_whose_stop_the_server_refuses_is_no_end_until_nothing_runs_any_more() -> None:
    """kubeflow/trainer#3994: the job was called failed though its pods had not been deleted."""
    world = await gang(activeDeadlineSeconds=100)
    stubborn = Stubborn(world)
    world.engine = world.operator(stubborn)  # type: ignore[arg-type]
    world.clock.forward(100)
    for _ in range(5):
        with pytest.raises(ClusterError):
            await world.settle()
        assert await world.phase() == ("Running", "DeadlineExceeded")
        assert len(await world.pods()) == 3
    stubborn.refuses = False
    await world.settle()
    assert await world.phase() == ("Failed", "DeadlineExceeded")
    assert await world.pods() == []


@pytest.mark.parametrize("code", [0, 65])
async def test_pods_that_have_ended_stay_for_their_logs_as_long_as_the_job_does(code: int) -> None:
    """kubeflow/trainer#3419: pods went although they were to be kept."""
    world = await gang(ttlSecondsAfterFinished=600)
    await world.end(code, json.dumps(RESULT | {"exitCode": code}))
    await world.settle()
    assert (await world.phase())[0] in ("Succeeded", "Failed")
    world.clock.forward(599)
    await world.settle()
    assert len(await world.pods(live=False)) == 3
    world.clock.forward(1)
    await world.pass_once()
    await world.node.settle()
    assert await world.pods(live=False) == []


# --- budgets ---------------------------------------------------------------------------------------------------------


async def test_each_cause_has_a_budget_of_its_own_and_evictions_need_none() -> None:
    """kubernetes-sigs/jobset#976 and #1129: cheap restarts used up the budget of dear ones."""
    world = await gang(retries={"infrastructure": 1, "application": 1})
    for code in (75, 69, 75, 70, 75):
        await end_one(world, code)
        await world.sit_out_back_off()
        assert (await world.phase())[0] == "Running"
    restarts = (await world.status())["restarts"]
    assert restarts == {
        "total": 5, "disruption": 3, "infrastructure": 1, "application": 1, "outOfMemory": 0, "stalled": 0,
    }  # fmt: skip
    await end_one(world, 69)
    assert await world.phase() == ("Failed", "Infrastructure")
    assert "1 of runPolicy.retries.infrastructure=1 were used" in (await world.status())["message"]


# --- queues ----------------------------------------------------------------------------------------------------------


async def test_a_job_in_a_queue_is_called_suspended_only_when_its_user_has_suspended_it() -> None:
    """kubeflow/trainer#3666 and kubeflow/sdk#803: jobs that Kueue had admitted were shown as suspended."""
    world = QueuedWorld(room=0)
    seen: list[tuple[str, str]] = []

    async def look() -> None:
        await world.settle()
        seen.append(((await world.status())["phase"], (await world.conditions())["Suspended"]))

    await world.create(scheduling={"queue": "team"})
    await look()
    world.kueue.room = 1
    await look()
    await world.kueue.preempt(await world.workload(), "Preempted")
    await look()
    world.kueue.room = 1
    await come_back(world)
    await look()
    await world.set_suspend(True)
    await look()
    assert seen == [
        ("Queued", "False"), ("Running", "False"), ("Queued", "False"), ("Running", "False"), ("Suspended", "True"),
    ]  # fmt: skip


async def test_a_queue_that_evicts_a_job_in_the_middle_of_its_restart_gets_its_room_and_lets_it_run_again() -> None:
    """kubernetes-sigs/kueue#14811: a job that was slow to come back was evicted, and kept its quota for ever."""
    world = await running(runtime=ScriptedRuntime(stop_code=None))
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    assert (await world.phase())[0] == "Restarting"
    await world.kueue.preempt(await world.workload(), "Exceeded the PodsReady timeout")
    await world.settle()
    await world.end(75)
    await world.settle()
    assert (await world.phase())[0] == "Queued"
    # What Kueue waits for before it gives the room to another one: no pod is active.
    workload = await world.workload()
    assert (workload["spec"]["suspend"], workload["status"].get("active", 0)) == (True, 0)
    assert await world.pods() == []
    world.kueue.room = 1
    await come_back(world)
    restarts = (await world.status())["restarts"]
    assert restarts["total"] == restarts["disruption"]
    assert len(await world.pods()) == 2


async def test_an_admitted_job_whose_pod_finds_no_room_again_leaves_the_queue_in_time() -> None:
    """kubernetes-sigs/kueue#2732: a replacement that could not be scheduled kept the others' quota."""
    world = await running(runPolicy={"startDeadlineSeconds": 3600})
    world.node.kubelet.room = 1
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    await world.sit_out_back_off()
    assert await world.phase() == ("Starting", "Unschedulable")
    world.clock.forward(3600)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
    assert NO_ROOM in status["message"]
    assert await world.cluster.list(JOB, None, {}) == []
    assert await world.pods() == []


async def test_a_job_that_kueue_puts_into_a_queue_of_its_own_accord_is_left_to_it() -> None:
    """kubernetes-sigs/kueue#1568: with a LocalQueue called default, each Job of the namespace waits in that."""
    world = QueuedWorld(room=0)
    world.engine = world.operator(DefaultQueue(world))  # type: ignore[arg-type]
    await world.create(**GANG, runPolicy={"preflight": "Always"}, distributed={"minNodes": 1})
    await world.settle()
    assert (await world.phase())[0] == "Preflight"
    world.kueue.room = 1
    await world.settle()
    await world.end(0, json.dumps({"exitCode": 0, "message": "fine"}))
    world.kueue.room = 0
    await world.settle()
    assert await world.phase() == ("Queued", "Queued")
    assert (await world.status())["message"] == "Waiting in queue default"
    world.kueue.room = 2
    await world.settle()
    assert ((await world.phase())[0], await world.admitted()) == ("Running", "True")
    # Not smaller than what the queue has given room to.
    world.node.kubelet.room = 2
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    await world.sit_out_back_off()
    world.clock.forward(10_000)
    await world.settle()
    assert await world.phase() == ("Starting", "Unschedulable")
    assert (await world.workload())["spec"]["completions"] == 3
    await world.set_suspend(True)
    await world.settle()
    assert (await world.phase())[0] == "Suspended"
    assert world.suspensions == [True]


async def test_a_job_without_a_queue_that_somebody_suspends_goes_on_uncharged() -> None:
    """kubernetes-sigs/kueue#800, #1527, #1568, #7649: children were suspended by mistake, and stayed so."""
    world = await gang()
    await world.cluster.patch(JOB, KEY, [{"op": "replace", "path": "/spec/suspend", "value": True}])
    await world.node.settle()
    assert await world.pods() == []
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["attempt"], status["restarts"]["total"]) == ("Running", 2, 0)
    assert len(await world.pods()) == 3
    # Nor is it held against the next one who does so.
    await world.cluster.patch(JOB, KEY, [{"op": "replace", "path": "/spec/suspend", "value": True}])
    await world.node.settle()
    await world.settle()
    assert ((await world.phase())[0], (await world.conditions())["Admitted"]) == ("Running", "True")


# --- what was not seen -----------------------------------------------------------------------------------------------


async def test_all_that_happens_between_two_looks_is_made_out_of_what_is_there() -> None:
    """nolar/kopf#698: of events that come together only the last one is handled."""
    world = await gang(retries={"application": 1, "infrastructure": 0})
    peer, culprit = (pod["metadata"]["name"] for pod in (await world.pods())[1:])
    world.node.runtime.end(peer, 69, json.dumps({"exitCode": 69, "message": "a collective broke"}))
    await world.node.settle()
    world.node.runtime.end(culprit, 70, json.dumps({"exitCode": 70, "message": "KeyError"}))
    await world.node.settle()
    await world.set_suspend(True)
    await world.set_suspend(False)
    # All of that is one look of an operator that has seen none of it.
    world.engine = world.operator(world.cluster)
    await world.settle()
    await world.sit_out_back_off()
    status = await world.status()
    assert (status["phase"], status["attempt"]) == ("Running", 2)
    assert (status["restarts"]["total"], status["restarts"]["application"]) == (1, 1)
    assert ("Restarting", "Application: KeyError") in await world.events()
