"""Jobs in a queue: Kueue alone lets them run, and what it takes back is no failure of theirs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, POD, Key, Kind, Object
from finetune_operator.observed import attempt_of, workload_attempt
from tests.operator.kueue import Kueue
from tests.operator.world import KEY, RESULT, FaultyCluster, Killed, World, admit_all
from tests.support.scripted import ScriptedRuntime

NODES = 2


class QueuedWorld(World):
    """A cluster with Kueue, and a record of what the operator does to `suspend`.

    Args:
        eager: Kueue acts before the Job controller; a Job that is suspended for a moment is never seen suspended.
    """

    def __init__(self, room: int = 1, eager: bool = False, runtime: ScriptedRuntime | None = None) -> None:
        super().__init__(admit=admit_all, runtime=runtime)
        self.kueue = Kueue(self.cluster, room)
        self.suspensions: list[bool] = []
        self.searches = 0
        """How often the operator has asked for events."""
        self.engine = self.operator(Recording(self))
        settle = self.node.settle

        async def with_kueue() -> float | None:
            if eager:
                await self.kueue.sync()
            await settle()
            await self.kueue.sync()
            return await settle()

        self.node.settle = with_kueue  # type: ignore[method-assign]

    async def admitted(self) -> str | None:
        return (await self.conditions()).get("Admitted")


class Recording:
    """Passes the operator's calls on, and notes what it writes to the suspension of Jobs and how often it asks for
    events."""

    def __init__(self, world: QueuedWorld) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.cluster, name)

    async def events_of(self, obj: Object) -> list[Object]:
        self._world.searches += 1
        return await self._world.cluster.events_of(obj)

    async def patch(self, kind: Kind, key: Key, patch: list[Object], subresource: str | None = None) -> Object | None:
        writes = [item["value"] for item in patch if item["path"] == "/spec/suspend" and item["op"] != "test"]
        self._world.suspensions += writes
        return await self._world.cluster.patch(kind, key, patch, subresource)


async def running(eager: bool = False, runtime: ScriptedRuntime | None = None, **spec: Any) -> QueuedWorld:
    world = QueuedWorld(eager=eager, runtime=runtime)
    spec["runPolicy"] = {"preflight": "Never", **spec.get("runPolicy", {})}
    await world.create(resources={"nodes": NODES}, scheduling={"queue": "team"}, **spec)
    await world.settle()
    assert ((await world.phase())[0], await world.admitted()) == ("Running", "True")
    return world


async def without_kueue(world: World) -> None:
    await world.node.jobs.sync()
    await world.node.kubelet.sync()


async def come_back(world: World) -> None:
    for _ in range(30):
        await world.settle()
        if (await world.phase())[0] == "Running":
            return
        world.clock.forward(1)
        await world.node.settle()
    raise AssertionError(await world.status())


async def check_pods(world: World, attempt: int) -> None:
    assert [attempt_of(pod["metadata"]) for pod in await world.pods()] == [attempt] * NODES


async def check_gang(world: World, attempt: int) -> None:
    await check_pods(world, attempt)
    assert (await world.status())["attempt"] == attempt


async def test_a_job_waits_in_its_queue_until_kueue_lets_it_run() -> None:
    world = QueuedWorld(room=0)
    await world.create(scheduling={"queue": "team"}, runPolicy={"startDeadlineSeconds": 60})
    await world.settle()
    assert await world.phase() == ("Queued", "Queued")
    assert ((await world.status())["message"], await world.admitted()) == ("Waiting in queue team", "False")
    # A queue may be long: the time in it is nobody's fault.
    world.clock.forward(100_000)
    await world.settle()
    assert (await world.phase())[0] == "Queued"
    assert world.searches == 0
    world.kueue.room = 1
    await world.settle()
    assert ((await world.phase())[0], await world.admitted()) == ("Running", "True")
    await world.end(0, json.dumps(RESULT))
    await world.settle()
    assert (await world.phase())[0] == "Succeeded"
    assert world.suspensions == []


async def test_a_job_that_kueue_takes_back_is_queued_again_and_charged_nothing() -> None:
    world = await running()
    await world.kueue.preempt(await world.workload(), "Preempted to accommodate a workload of a higher priority")
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["restarts"]["disruption"], status["restarts"]["total"]) == ("Queued", 1, 1)
    assert await world.admitted() == "False"
    why = "Disruption: Queue team took the job back: Preempted to accommodate a workload of a higher priority"
    assert ("Restarting", why) in await world.events()
    assert await world.pods() == []
    # Events are dear: they are searched for the reason once.
    for _ in range(3):
        await world.pass_once()
    assert world.searches == 1
    world.kueue.room = 1
    await come_back(world)
    await check_gang(world, 2)
    assert (await world.status())["restarts"]["total"] == 1
    assert world.suspensions == []


async def test_a_job_that_is_taken_back_again_uses_no_number_twice() -> None:
    """Kueue makes the pod template again what it was at first: also the number of the attempt, if it does not know of
    another one."""
    world = await running()
    for attempt in (2, 4):
        await world.kueue.preempt(await world.workload(), "Preempted")
        await world.settle()
        assert ((await world.phase())[0], (await world.status())["attempt"]) == ("Queued", attempt)
        # Now the operator is away.
        world.kueue.room = 1
        await world.kueue.sync()
        await world.node.settle()
        await check_pods(world, attempt)
        await come_back(world)
        await check_gang(world, attempt)
        await world.end(69)
        await world.settle()
        await world.sit_out_back_off()
        await come_back(world)
        await check_gang(world, attempt + 1)
    restarts = (await world.status())["restarts"]
    assert (restarts["disruption"], restarts["infrastructure"]) == (2, 2)
    assert world.suspensions == [True, True]


async def test_pods_that_kueue_has_resumed_under_an_old_number_are_numbered_anew() -> None:
    world = await running(runtime=ScriptedRuntime(None))
    await world.kueue.preempt(await world.workload(), "Preempted")
    await world.end(75)
    await world.settle()
    assert (await world.status())["attempt"] == 2
    old = {"op": "add", "path": "/spec/template/metadata/annotations/finetune.dev~1attempt", "value": "1"}
    await world.cluster.patch(JOB, KEY, [old, {"op": "replace", "path": "/spec/suspend", "value": False}])
    await without_kueue(world)
    await check_pods(world, 1)
    world.kueue.room = 1
    await world.settle()
    await world.end(75)
    await come_back(world)
    await check_gang(world, 2)
    restarts = (await world.status())["restarts"]
    assert (restarts["total"], world.suspensions) == (1, [True])


async def test_a_reason_that_kueue_gives_late_is_waited_for() -> None:
    world = await running()
    await world.cluster.patch(JOB, KEY, [{"op": "replace", "path": "/spec/suspend", "value": True}])
    await without_kueue(world)
    assert await world.pass_once() == pytest.approx(2.0)
    assert ((await world.phase())[0], await world.admitted()) == ("Running", "True")
    await world.cluster.emit(await world.workload(), "Stopped", "Preempted to accommodate a workload")
    await world.pass_once()
    why = "Disruption: Queue team took the job back: Preempted to accommodate a workload"
    assert ("Restarting", why) in await world.events()


async def test_a_reason_that_kueue_does_not_give_is_not_waited_for_long() -> None:
    world = await running()
    await world.cluster.patch(JOB, KEY, [{"op": "replace", "path": "/spec/suspend", "value": True}])
    await without_kueue(world)
    await world.pass_once()
    world.clock.forward(2)
    await world.settle()
    assert ("Restarting", "Disruption: Queue team took the job back: Kueue gave no reason") in await world.events()


async def test_a_job_that_is_let_in_while_the_operator_looks_was_not_taken_back() -> None:
    """The Job is read before its pods."""
    world = QueuedWorld(room=0)
    await world.create(resources={"nodes": NODES}, scheduling={"queue": "team"}, runPolicy={"preflight": "Never"})
    await world.settle()
    world.engine = world.operator(Interrupted(world))  # type: ignore[arg-type]
    world.kueue.room = 1
    await world.pass_once()
    assert (await world.phase())[0] == "Queued"
    await come_back(world)
    await check_gang(world, 1)
    assert (await world.status())["restarts"]["total"] == 0


@pytest.mark.parametrize("eager", [False, True], ids=["the Job controller is faster", "Kueue is faster"])
async def test_a_gang_is_started_again_in_its_place_by_one_suspension(eager: bool) -> None:
    world = await running(eager)
    for attempt in (2, 3):
        pod = (await world.pods())[0]
        await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
        await come_back(world)
        await check_gang(world, attempt)
        assert (await world.status())["restarts"]["disruption"] == attempt - 1
        assert world.suspensions == [True] * (attempt - 1)
        await world.sit_out_back_off()
    assert len(await world.cluster.list(JOB, None, {})) == 1


async def test_a_pod_of_an_earlier_attempt_is_gone_only_when_it_has_ended() -> None:
    world = await running(eager=True, runtime=ScriptedRuntime(None))
    world.node.runtime.end((await world.pods())[1]["metadata"]["name"], 69)
    await world.node.kubelet.sync()
    while workload_attempt(await world.workload()) == 1:
        await world.pass_once()
        await world.node.jobs.sync()
    await world.kueue.sync()
    # This pass deletes what is left of the first attempt, and does not take that for its end.
    await world.pass_once()
    assert [bool(pod["metadata"].get("deletionTimestamp")) for pod in await world.pods()] == [True]
    assert await world.phase() == ("Restarting", "WaitingForOldPods")


async def test_an_old_pod_that_ends_well_after_the_next_attempt_was_numbered_leaves_no_gang_without_its_index() -> None:
    world = await running(runtime=ScriptedRuntime(None))
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    while workload_attempt(await world.workload()) == 1:
        await world.pass_once()
        await world.node.jobs.sync()
    for pod in await world.pods():
        world.node.runtime.end(pod["metadata"]["name"], 0)
    world.node.runtime.stop_code = 75
    await come_back(world)
    await check_gang(world, 3)
    assert (await world.status())["restarts"]["disruption"] == 2


async def test_a_user_who_suspends_gives_the_place_in_the_queue_back() -> None:
    world = await running()
    await world.set_suspend(True)
    await world.settle()
    assert await world.phase() == ("Suspended", "Suspended")
    assert await world.cluster.list(JOB, None, {}) == []
    assert await world.pods() == []
    assert (await world.status())["restarts"]["total"] == 0
    world.kueue.room = 0
    await world.set_suspend(False)
    await world.settle()
    assert (await world.phase())[0] == "Queued"
    world.kueue.room = 1
    await come_back(world)
    await check_gang(world, 2)
    assert (await world.status())["restarts"]["total"] == 0


async def test_a_user_who_goes_on_before_all_is_torn_down_is_charged_nothing() -> None:
    world = await running(runtime=ScriptedRuntime(None))
    await world.set_suspend(True)
    await world.settle()
    assert await world.phase() == ("Running", "Suspending")
    await world.set_suspend(False)
    await world.settle()
    assert await world.phase() == ("Starting", "WaitingForOldPods")
    world.clock.forward(10)
    await world.settle()
    await world.end(75)
    await come_back(world)
    await check_gang(world, 2)
    assert (await world.status())["restarts"]["total"] == 0


async def test_nor_where_the_operator_is_killed_while_it_gives_the_place_back() -> None:
    deleted = 0
    for n in range(1, 100):
        world = await running(runtime=ScriptedRuntime(None))
        await world.set_suspend(True)
        faulty = FaultyCluster(world.cluster, n, after=True)
        world.engine = world.operator(faulty)  # type: ignore[arg-type]
        try:
            await world.settle()
        except (Killed, BaseExceptionGroup):  # a task group wraps it
            deleted += not await world.cluster.list(JOB, None, {})
        else:
            break
        world.engine = world.operator(world.cluster)
        await world.set_suspend(False)
        await world.settle()
        assert (await world.status())["restarts"]["total"] == 0, f"killed at call {n}"
    assert deleted


async def test_an_admission_that_no_status_tells_of_counts_if_there_are_pods_of_it() -> None:
    world = QueuedWorld(runtime=ScriptedRuntime(None))
    await world.create(resources={"nodes": NODES}, scheduling={"queue": "team"}, runPolicy={"preflight": "Never"})
    await world.pass_once()
    await world.node.settle()
    await check_pods(world, 1)
    # The operator is away all the while.
    await world.kueue.preempt(await world.workload(), "Preempted")
    await world.node.settle()
    world.engine = world.operator(world.cluster)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["restarts"]["disruption"]) == ("Queued", 1)
    await world.end(75)
    world.kueue.room = 1
    await come_back(world)
    await check_gang(world, 2)


async def test_a_job_that_may_not_be_started_again_leaves_the_queue() -> None:
    world = await running(runPolicy={"retries": {"infrastructure": 0}})
    world.node.runtime.end((await world.pods())[1]["metadata"]["name"], 69)
    await world.node.settle()
    await world.settle()
    assert await world.phase() == ("Failed", "Infrastructure")
    assert await world.cluster.list(JOB, None, {}) == []
    assert await world.pods() == []


async def test_pods_of_an_earlier_attempt_that_do_not_end_hold_a_gang_up_no_longer_than_it_may_wait() -> None:
    world = await running(runtime=ScriptedRuntime(None), runPolicy={"startDeadlineSeconds": 10})
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    assert await world.phase() == ("Restarting", "WaitingForOldPods")
    world.clock.forward(10)
    await world.settle()
    assert (await world.status())["reason"] == "DeadlineExceeded"
    await world.end(75)
    await world.settle()
    assert await world.phase() == ("Failed", "DeadlineExceeded")


async def test_a_job_that_fails_for_good_by_its_own_rule_is_failed_in_its_place() -> None:
    world = await running()
    await world.end(65)
    await world.settle()
    assert await world.phase() == ("Failed", "Data")


async def test_a_job_in_a_queue_can_be_deleted() -> None:
    world = QueuedWorld(room=0)
    raw = await world.create(scheduling={"queue": "team"})
    await world.settle()
    await world.cluster.delete(FINE_TUNE_JOB, KEY, raw["metadata"]["uid"])
    assert await world.pass_once() is None
    assert await world.cluster.list(JOB, None, {}) == []


async def test_a_queue_that_resumes_within_moments_resumes_the_next_attempt_and_no_old_one() -> None:
    """Between two calls of the operator there is time enough for Kueue."""
    world = await running(runPolicy={"retries": {"infrastructure": 3}})
    world.engine = world.operator(Hasty(world))  # type: ignore[arg-type]
    await world.end(69)
    await world.settle()
    await world.sit_out_back_off()
    status = await world.status()
    assert (status["phase"], status["attempt"], status["restarts"]["infrastructure"]) == ("Running", 2, 1)
    assert {attempt_of(pod["metadata"]) for pod in await world.pods()} == {2}
    assert world.suspensions == [True]


class Hasty(Recording):
    """Kueue looks at its Jobs before and after whatever the operator writes."""

    async def create(self, manifest: Object) -> Object:
        await self._world.kueue.sync()
        return await self._world.cluster.create(manifest)

    async def patch(self, kind: Kind, key: Key, patch: list[Object], subresource: str | None = None) -> Object | None:
        await self._world.kueue.sync()
        patched = await super().patch(kind, key, patch, subresource)
        await self._world.kueue.sync()
        return patched


class Interrupted(Recording):
    """All others act between the look at a Job and the look at its pods."""

    async def list(self, *args: Any) -> list[Object]:
        await self._world.node.settle()
        return await self._world.cluster.list(*args)
