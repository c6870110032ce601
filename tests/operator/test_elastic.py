"""Elastic jobs: where there is no room for all pods, they go on with fewer, and with all again when they can."""

from __future__ import annotations

from collections.abc import Awaitable

import pytest

from finetune_api.contract import ANNOTATION_NODES, ENV_NNODES
from finetune_operator.cluster.port import JOB, POD, Key, Object
from finetune_operator.observed import index
from tests.operator.world import KEY, FaultyCluster, Killed, World, admit_all
from tests.support.scripted import NO_ROOM

NODES, PATIENCE = 4, 60


async def started(room: int | None, accumulation: int = 1, **distributed: int) -> World:
    """A job of four pods in a cluster with room for so many."""
    world = World(admit=admit_all)
    world.node.kubelet.room = room
    await world.create(
        resources={"nodes": NODES},
        runPolicy={"preflight": "Never"},
        hyperparameters={"gradientAccumulationSteps": accumulation},
        distributed={"minNodes": 1, "minNodesAfterSeconds": PATIENCE, **distributed},
    )
    await world.settle()
    return world


async def after(world: World, seconds: float) -> None:
    world.clock.forward(seconds)
    await world.settle()


async def shrunk(room: int = 2, **spec: int) -> World:
    world = await started(room, **spec)
    await after(world, PATIENCE)
    return world


async def sizes(world: World) -> tuple[int, int, set[str]]:
    """Of the Job, by its status, and as the live pods are told."""
    spec = (await world.workload())["spec"]
    assert spec["completions"] == spec["parallelism"]
    told = {pod["metadata"]["annotations"][ANNOTATION_NODES] for pod in await world.pods()}
    return spec["completions"], (await world.status())["nodes"], told


def nodes_variable(workload: Object) -> Object:
    (trainer,) = workload["spec"]["template"]["spec"]["containers"]
    found: Object = next(item for item in trainer["env"] if item["name"] == ENV_NNODES)
    return found


async def lose(world: World, rank: int) -> None:
    pod = next(pod for pod in await world.pods() if index(pod) == rank)
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()


async def test_a_job_waits_for_all_its_pods_first() -> None:
    world = await started(room=2)
    await after(world, PATIENCE - 1)
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Starting", "Unschedulable")
    assert NO_ROOM in status["message"]
    assert await sizes(world) == (4, 4, {"4"})


async def test_it_goes_on_with_those_that_have_room() -> None:
    world = await shrunk(room=2)
    assert (await world.phase())[0] == "Running"
    assert await sizes(world) == (2, 2, {"2"})
    assert nodes_variable(await world.workload())["valueFrom"]["fieldRef"]["fieldPath"].endswith(
        f"['{ANNOTATION_NODES}']"
    )
    status = await world.status()
    assert (status["attempt"], status["restarts"]["total"]) == (2, 0)
    assert ("Shrinking", "Not all of 4 pods found room within 1m0s: going on with 2") in await world.events()


async def test_it_takes_as_many_as_share_a_step_evenly() -> None:
    assert await sizes(await shrunk(room=3)) == (2, 2, {"2"})
    # A step of four pods with three micro-steps has twelve batches.
    assert await sizes(await shrunk(room=3, accumulation=3)) == (3, 3, {"3"})


@pytest.mark.parametrize("room", [0, 1])
async def test_fewer_than_min_nodes_are_not_enough(room: int) -> None:
    world = await started(room, minNodes=2)
    await after(world, 20 * PATIENCE)
    assert await world.phase() == ("Starting", "Unschedulable")
    assert await sizes(world) == (4, 4, {"4"})
    world.node.kubelet.room = None
    for pod in await world.pods():
        # The scheduler looks again.
        await world.cluster.patch(
            POD, Key("ml", pod["metadata"]["name"]), [{"op": "remove", "path": "/status/conditions"}], "status"
        )
    await world.settle()
    assert (await world.phase())[0] == "Running"


async def test_every_restart_tries_all_again() -> None:
    world = await shrunk(room=2)
    world.node.kubelet.room = None
    await lose(world, 1)
    assert await sizes(world) == (4, 4, {"4"})
    status = await world.status()
    assert (status["phase"], status["attempt"], status["restarts"]["disruption"]) == ("Running", 3, 1)


async def test_a_lost_node_that_leaves_no_room_makes_it_smaller_again() -> None:
    world = await shrunk(room=2)
    world.node.kubelet.room = 1
    await lose(world, 0)
    assert await sizes(world) == (4, 4, {"4"})
    await after(world, PATIENCE)
    assert await sizes(world) == (1, 1, {"1"})
    assert (await world.phase())[0] == "Running"


async def test_one_that_was_suspended_tries_all_again() -> None:
    world = await shrunk(room=2)
    await world.set_suspend(True)
    await world.settle()
    world.node.kubelet.room = None
    await world.set_suspend(False)
    await world.settle()
    assert await sizes(world) == (4, 4, {"4"})


async def test_one_that_is_resumed_before_its_pods_are_gone_tries_all_again() -> None:
    world = await shrunk(room=2)
    world.node.runtime.stop_code = None
    await world.set_suspend(True)
    await world.settle()
    assert (await world.phase())[0] != "Suspended"
    world.node.kubelet.room = None
    await world.set_suspend(False)
    await world.settle()
    assert (await world.phase()) == ("Starting", "WaitingForOldPods")
    await world.end(75)
    await world.settle()
    assert await sizes(world) == (4, 4, {"4"})


async def test_it_ends_well_with_fewer() -> None:
    world = await shrunk(room=2)
    await world.end(0)
    await world.settle()
    assert (await world.phase())[0] == "Succeeded"


async def test_without_min_nodes_it_waits_for_ever() -> None:
    world = World(admit=admit_all)
    world.node.kubelet.room = 2
    await world.create(resources={"nodes": NODES}, runPolicy={"preflight": "Never"})
    await world.settle()
    await after(world, 100_000)
    assert await world.phase() == ("Starting", "Unschedulable")
    assert (await world.workload())["spec"]["completions"] == NODES


async def test_an_operator_that_is_killed_at_any_call_makes_it_smaller_once() -> None:
    call, killed = 0, True
    while killed:
        call += 1
        for late in (False, True):
            world = await started(room=2)
            world.engine = world.operator(FaultyCluster(world.cluster, call, late))  # type: ignore[arg-type]
            killed = await is_killed(after(world, PATIENCE))
            world.engine = world.operator(world.cluster)
            await world.settle()
            assert await sizes(world) == (2, 2, {"2"}), call
            assert (await world.status())["attempt"] == 2
            assert len(await world.cluster.list(JOB, KEY.namespace, {})) == 1
    assert call > 10


async def is_killed(work: Awaitable[None]) -> bool:
    try:
        await work
    except (Killed, BaseExceptionGroup):  # a task group wraps it
        return True
    return False
