"""A gang of four pods through everything that clusters do to pods: counted once, by cause, and started again whole."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable

import pytest

from finetune_api.contract import CheckpointRef
from finetune_operator.cluster.port import EVENT, POD, Key, Object
from finetune_operator.observed import attempt_of, index
from tests.operator.world import KEY, RESULT, FaultyCluster, Killed, World, admit_all
from tests.support.scripted import ScriptedRuntime

NODES = 4
EVICTION, PREEMPTION = "EvictionByEvictionAPI", "PreemptionByScheduler"
PEER_LOST = json.dumps({"exitCode": 69, "message": "a collective broke", "advice": "look at the other pods"})
GRACE_SECONDS = 120


async def gang(runtime: ScriptedRuntime | None = None, **spec: object) -> World:
    world = World(runtime=runtime, admit=admit_all)
    policy = {"preflight": "Never", **spec.pop("runPolicy", {})}  # type: ignore[dict-item]
    await world.create(resources={"nodes": NODES}, runPolicy=policy, **spec)
    await world.settle()
    assert await world.phase() == ("Running", "Running")
    return world


async def pod_of(world: World, rank: int) -> Object:
    return next(pod for pod in await world.pods() if index(pod) == rank)


def key_of(pod: Object) -> Key:
    return Key("ml", pod["metadata"]["name"])


async def delete(world: World, rank: int, reason: str | None = None) -> Object:
    """As `kubectl delete pod` does; with a reason as an eviction does, which says so first."""
    pod = await pod_of(world, rank)
    if reason is not None:
        target = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": f"Because of {reason}"}
        patch = [{"op": "add", "path": "/status/conditions/-", "value": target}]
        await world.cluster.patch(POD, key_of(pod), patch, "status")
    await world.cluster.delete(POD, key_of(pod), pod["metadata"]["uid"])
    return pod


async def kill_rank(world: World, rank: int) -> None:
    """The kernel ends one rank; its peers break in the next collective and wait for the request to stop."""
    world.node.runtime.end((await pod_of(world, rank))["metadata"]["name"], 137)
    await world.node.settle()


async def lose_node(world: World, rank: int) -> None:
    """What the node and taint controllers do about a node that has gone silent."""
    pod = await pod_of(world, rank)
    world.node.runtime.lost.add(pod["metadata"]["name"])
    await delete(world, rank, "DeletionByTaintManager")


async def evict_all(world: World) -> None:
    for rank in range(NODES):
        await delete(world, rank, EVICTION)


async def come_back(world: World, most_seconds: float, step: float = 1) -> float:
    """Until all pods run again; the seconds that the clock went on by, so many at a time."""
    start = world.clock.now
    while True:
        await world.settle()
        passed = (world.clock.now - start).total_seconds()
        if (await world.status())["phase"] == "Running":
            return passed
        assert passed <= most_seconds, await world.status()
        world.clock.forward(step)
        await world.node.settle()


async def check_one_incarnation(world: World, attempt: int) -> None:
    """All pods are of one attempt, each index once, and all numbers agree."""
    pods = await world.pods()
    assert sorted(map(index, pods)) == list(range(NODES))
    assert {attempt_of(pod["metadata"]) for pod in pods} == {attempt}
    assert (await world.status())["attempt"] == attempt


Blow = Callable[[World], Awaitable[object]]
BLOWS: dict[str, tuple[Blow, str, float]] = {
    "one rank is killed": (lambda world: kill_rank(world, 2), "infrastructure", 12),
    "one pod is evicted": (lambda world: delete(world, 1, EVICTION), "disruption", 2),
    "one pod is preempted": (lambda world: delete(world, 3, PREEMPTION), "disruption", 2),
    "one pod is deleted": (lambda world: delete(world, 1), "disruption", 2),
    "index 0 is deleted": (lambda world: delete(world, 0), "disruption", 2),
    "all are evicted": (evict_all, "disruption", 2),
    "one node is lost": (lambda world: lose_node(world, 2), "disruption", GRACE_SECONDS + 32),
    "the node of index 0 is lost": (lambda world: lose_node(world, 0), "disruption", GRACE_SECONDS + 32),
}


@pytest.mark.parametrize("blow", BLOWS)
async def test_a_gang_comes_back_whole_when(blow: str) -> None:
    world = await gang()
    strike, counter, most_seconds = BLOWS[blow]
    await strike(world)
    await come_back(world, most_seconds)
    restarts = (await world.status())["restarts"]
    assert (restarts["total"], restarts[counter]) == (1, 1)
    await check_one_incarnation(world, 2)
    assert [reason for reason, _ in await world.events()] == ["Restarting"]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
async def test_two_incarnations_never_meet(order: tuple[int, ...]) -> None:
    """Pods that take their time to stop hold the next attempt back, whatever the rest of the gang does."""
    world = await gang(ScriptedRuntime(stop_code=None))
    await delete(world, 1)
    await world.settle()
    names = [pod["metadata"]["name"] for pod in await world.pods()]
    for number, name in enumerate(names[place] for place in order):
        assert (await world.phase())[0] == "Restarting"
        assert len(await world.pods()) == NODES - number
        world.node.runtime.end(name, 75)
        await world.node.settle()
        await world.settle()
    await check_one_incarnation(world, 2)


async def test_twenty_incidents_in_a_row_are_counted_by_cause_and_the_last_takes_no_longer_than_the_first() -> None:
    world, dice = await gang(), random.Random(4)
    seconds = []
    for number in range(20):
        await delete(world, dice.randrange(NODES), dice.choice([None, EVICTION, PREEMPTION]))
        seconds.append(await come_back(world, 600))
        await check_one_incarnation(world, number + 2)
    restarts = (await world.status())["restarts"]
    assert (restarts["total"], restarts["disruption"]) == (20, 20)
    assert max(seconds) <= 2
    # Nothing of all that is left but the gang itself.
    assert len(await world.pods(live=False)) == NODES


async def test_a_gang_whose_node_is_lost_in_the_middle_of_its_end_still_ends() -> None:
    world = await gang()
    await lose_node(world, 3)
    for rank in (0, 1, 2):
        world.node.runtime.end((await pod_of(world, rank))["metadata"]["name"], 65, json.dumps({"exitCode": 65}))
    await world.node.settle()
    await world.settle()
    assert (await world.phase())[0] != "Failed"
    world.clock.forward(GRACE_SECONDS + 31)
    await world.settle()
    assert await world.phase() == ("Failed", "Data")
    assert await world.pods() == []


async def test_a_user_may_suspend_a_gang_whose_node_is_lost() -> None:
    world = await gang()
    world.node.runtime.lost.add((await pod_of(world, 1))["metadata"]["name"])
    await world.set_suspend(True)
    await world.settle()
    assert (await world.phase())[0] == "Running"
    world.clock.forward(GRACE_SECONDS + 31)
    await world.settle()
    assert (await world.phase())[0] == "Suspended"
    assert (await world.status())["restarts"]["total"] == 0
    await world.set_suspend(False)
    await world.settle()
    await check_one_incarnation(world, 2)


async def test_a_lost_node_is_not_charged_as_a_failure_by_those_who_notice_it_first() -> None:
    """The peers leave after half a minute; the cluster waits longer before it deletes the pod."""
    world = await gang()
    lost = await pod_of(world, 2)
    world.node.runtime.lost.add(lost["metadata"]["name"])
    ready = [{"type": "Ready", "status": "False"}]
    await world.cluster.patch(
        POD, key_of(lost), [{"op": "add", "path": "/status/conditions", "value": ready}], "status"
    )
    for rank in (0, 1, 3):
        world.node.runtime.end((await pod_of(world, rank))["metadata"]["name"], 69, PEER_LOST)
    await world.node.settle()
    await world.settle()
    status = await world.status()
    assert (status["restarts"]["disruption"], status["restarts"]["infrastructure"]) == (1, 0)
    assert status["incident"]["message"] == f"Node this-machine with pod {lost['metadata']['name']} no longer answers"


async def test_failed_pods_are_deleted_when_they_are_replaced_and_their_last_lines_are_kept_in_the_event() -> None:
    world = await gang(runPolicy={"retries": {"application": 1}})
    word = {"exitCode": 70, "message": "KeyError: 'text'", "log": 'File "rows.py", line 3\n  row["text"]'}
    name = (await pod_of(world, 1))["metadata"]["name"]
    world.node.runtime.end(name, 70, json.dumps(word))
    await world.node.settle()
    await come_back(world, 12)
    assert len(await world.pods(live=False)) == NODES
    events = [event["message"] for event in await world.cluster.list(EVENT, "ml", {})]
    assert events == ['Application: KeyError: \'text\':\nFile "rows.py", line 3\n  row["text"]']


async def test_the_checkpoint_of_the_last_word_is_in_status_after_a_restart() -> None:
    world = await gang()
    checkpoint = CheckpointRef(uri="s3://out/tune/checkpoints/step-00000007", step=7, time="2026-01-01T12:00:00Z")
    word = json.dumps({"exitCode": 75, "message": "saved", "checkpoint": checkpoint.to_wire()})
    world.node.runtime.end((await pod_of(world, 0))["metadata"]["name"], 75, word)
    await world.node.settle()
    await come_back(world, 12)
    assert (await world.status())["checkpoint"]["step"] == 7


async def test_a_node_on_which_pods_fail_again_is_avoided_where_there_is_another() -> None:
    world = await gang(scheduling={"affinity": {"podAntiAffinity": {}}})
    for times in (1, 2):
        await kill_rank(world, 1)
        await come_back(world, 25)
        assert (await world.status())["nodeFailures"] == {"this-machine": times}
        affinity = (await world.workload())["spec"]["template"]["spec"]["affinity"]
        assert ("nodeAffinity" in affinity, affinity["podAntiAffinity"]) == (times == 2, {})
    (term,) = affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    field = {"key": "metadata.name", "operator": "NotIn", "values": ["this-machine"]}
    assert term == {"weight": 100, "preference": {"matchFields": [field]}}


async def test_a_node_is_not_blamed_for_evictions_and_lost_peers() -> None:
    world = await gang()
    await delete(world, 1, EVICTION)
    await come_back(world, 2)
    world.node.runtime.end((await pod_of(world, 0))["metadata"]["name"], 69, PEER_LOST)
    await world.node.settle()
    await come_back(world, 12)
    assert (await world.status())["nodeFailures"] == {}


@pytest.mark.parametrize("by_the_user", [False, True])
async def test_a_rank_that_has_ended_well_is_run_again_with_its_gang(by_the_user: bool) -> None:
    """As when the node of index 0 dies after the delivery, of which only the others have heard."""
    world = await gang()
    world.node.runtime.end((await pod_of(world, 1))["metadata"]["name"], 0)
    await world.node.settle()
    await world.settle()
    if by_the_user:
        await world.set_suspend(True)
        await world.settle()
        await world.set_suspend(False)
    else:
        await delete(world, 0)
    await come_back(world, 2)
    await check_one_incarnation(world, 2)


async def test_a_gang_succeeds_after_an_incident() -> None:
    world = await gang()
    await kill_rank(world, 3)
    await come_back(world, 12)
    await world.end(0, json.dumps(RESULT))
    await world.settle(KEY)
    assert (await world.phase())[0] == "Succeeded"


# --- crashes ---------------------------------------------------------------------------------------------------------


async def survive(world: World) -> None:
    """Until the gang runs; a killed operator is started anew, with nothing in its memory."""
    for _ in range(3):
        try:
            await come_back(world, 2 * GRACE_SECONDS, step=80)
            return
        except (Killed, BaseExceptionGroup):  # a task group wraps it
            world.engine = world.operator(world.cluster)


async def two_incidents(fail_at: int | None, after: bool) -> tuple[Object, int]:
    """An eviction, then the loss of index 0's node."""
    world = await gang()
    faulty = FaultyCluster(world.cluster, fail_at, after)
    world.engine = world.operator(faulty)  # type: ignore[arg-type]
    for strike in (lambda: delete(world, 1, EVICTION), lambda: lose_node(world, 0)):
        await strike()
        await survive(world)
    await check_one_incarnation(world, 3)
    return (await world.status())["restarts"], faulty.calls


@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after it took effect"])
async def test_an_operator_killed_at_any_call_counts_each_incident_once(after: bool) -> None:
    restarts, calls = await two_incidents(None, after)
    assert restarts["total"] == restarts["disruption"] == 2
    for n in range(1, calls + 1):
        assert (await two_incidents(n, after))[0] == restarts, f"killed at call {n}"
