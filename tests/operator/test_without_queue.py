"""Jobs without a queue where Kueue manages all Jobs: it lets none of them run, and nobody fights it over that."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.cluster.port import JOB, Object
from tests.operator.kueue import Kueue
from tests.operator.test_asked_elsewhere import DefaultQueue
from tests.operator.test_queueing import NODES, QueuedWorld, Recording, check_gang
from tests.operator.world import KEY


class Managed(QueuedWorld):
    """Kueue manages every Job.

    Args:
        at_birth: its webhook suspends them when they are made; otherwise its controller does so when it sees them run.
    """

    def __init__(self, at_birth: bool) -> None:
        super().__init__()
        self.kueue = Kueue(self.cluster, everything=True)
        if at_birth:
            self.engine = self.operator(Webhook(self))  # type: ignore[arg-type]

    async def start(self, **spec: Any) -> None:
        policy = {"preflight": "Never", "startDeadlineSeconds": 60}
        await self.create(resources={"nodes": NODES}, runPolicy=policy, **spec)
        await self.settle()

    async def admitted_for(self) -> tuple[str, str]:
        conditions = (await self.status())["conditions"]
        return next((item["status"], item["reason"]) for item in conditions if item["type"] == "Admitted")


class Webhook(Recording):
    """Suspends every new Job."""

    async def create(self, manifest: Object) -> Object:
        if manifest["kind"] == JOB.kind:
            manifest = {**manifest, "spec": {**manifest["spec"], "suspend": True}}
        return await self._world.cluster.create(manifest)


@pytest.fixture(params=[True, False], ids=["suspended at birth", "suspended when seen"])
async def world(request: pytest.FixtureRequest) -> Managed:
    managed = Managed(request.param)
    await managed.start()
    return managed


async def test_it_is_resumed_once_and_then_says_what_helps(world: Managed) -> None:
    assert await world.phase() == ("Queued", "NoQueue")
    assert await world.admitted_for() == ("False", "NoQueue")
    status = await world.status()
    assert "Apply the job anew with a LocalQueue in spec.scheduling.queue; or have a LocalQueue" in status["message"]
    assert (status["attempt"], status["restarts"]["total"]) == (2, 0)
    assert [reason for reason, _ in await world.events() if reason == "NoQueue"] == ["NoQueue"]
    before = (await world.workload())["metadata"]["resourceVersion"]
    for _ in range(5):
        world.clock.forward(10_000)
        await world.settle()
    assert (await world.workload())["metadata"]["resourceVersion"] == before
    assert await world.phase() == ("Queued", "NoQueue")


async def test_nor_does_a_restart_of_the_operator_begin_it_anew(world: Managed) -> None:
    before = (await world.workload())["metadata"]["resourceVersion"]
    world.engine = world.operator(world.cluster)
    await world.settle()
    assert (await world.workload())["metadata"]["resourceVersion"] == before


async def test_a_label_on_its_job_puts_it_into_a_queue(world: Managed) -> None:
    label = {"op": "add", "path": "/metadata/labels/kueue.x-k8s.io~1queue-name", "value": "team"}
    await world.cluster.patch(JOB, KEY, [label])
    await world.node.settle()
    await world.settle()
    await world.settle()
    assert ((await world.phase())[0], await world.admitted()) == ("Running", "True")
    await check_gang(world, 2)
    assert (await world.status())["restarts"]["total"] == 0


async def test_a_default_queue_takes_it_when_it_was_suspended_and_goes_on(world: Managed) -> None:
    world.engine = world.operator(DefaultQueue(world))  # type: ignore[arg-type]
    await world.set_suspend(True)
    await world.settle()
    assert await world.phase() == ("Suspended", "Suspended")
    assert await world.cluster.list(JOB, None, {}) == []
    await world.set_suspend(False)
    await world.settle()
    assert ((await world.phase())[0], await world.admitted()) == ("Running", "True")
    await check_gang(world, 3)
    assert (await world.status())["restarts"]["total"] == 0


async def test_without_one_it_is_not_resumed_once_more(world: Managed) -> None:
    await world.set_suspend(True)
    await world.settle()
    resumed = world.suspensions.count(False)
    await world.set_suspend(False)
    await world.settle()
    assert await world.phase() == ("Queued", "NoQueue")
    assert world.suspensions.count(False) == resumed
