"""The engine as it runs: workers, poller, resync, settings and endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_api.contract import Progress, Stage
from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, ClusterError, Key, Kind, Object
from finetune_operator.endpoints import application
from finetune_operator.engine import Engine
from finetune_operator.health import Health
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressPoller
from finetune_operator.settings import SettingsError, load
from finetune_operator.watches import Watches
from tests.operator.world import RESULT, FaultyCluster, World, admit_all, manifest


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[None]:
    task = asyncio.create_task(engine.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Give the loop away until an awaitable condition holds."""
    async with asyncio.timeout(seconds):
        while not await true():  # noqa: ASYNC110 - the condition is the state of a cluster, which has no event
            await asyncio.sleep(0)


async def test_two_hundred_jobs_succeed_each_with_no_more_than_eight_writes() -> None:
    world = World(admit=admit_all)
    counting = FaultyCluster(world.cluster)
    engine = world.operator(counting)
    world.cluster.subscribe(lambda change: engine.put(job_key(change.obj)))
    keys = [Key("ml", f"job-{number}") for number in range(200)]

    async def phases() -> set[str | None]:
        await world.node.settle()
        return {(await world.status(key)).get("phase") for key in keys}

    async def all_run() -> bool:
        return await phases() == {"Running"}

    async def all_succeeded() -> bool:
        return await phases() == {"Succeeded"}

    async with running(engine):
        for key in keys:
            await world.cluster.create(manifest(key.name))
        await until(all_run)
        await world.end(0, json.dumps(RESULT))
        await until(all_succeeded)
    assert len(counting.writes) <= 8 * len(keys)
    assert len(await world.cluster.list(JOB, None, {})) == len(keys)


def job_key(obj: Object) -> Key:
    labels = obj["metadata"].get("labels") or {}
    return Key(obj["metadata"]["namespace"], labels.get("finetune.dev/job", obj["metadata"]["name"]))


async def test_a_resync_finds_jobs_of_which_no_watch_has_told() -> None:
    world = World()
    await world.create()

    async def runs() -> bool:
        await world.node.settle()
        return (await world.phase())[0] == "Starting"

    async with running(world.engine):
        await until(runs)


@pytest.mark.parametrize("kind", ["Job", "Pod"])
async def test_jobs_are_looked_at_although_their_children_cannot_be_listed(kind: str) -> None:
    world, listed = World(), asyncio.Event()
    await world.create()

    class Forgetful(FaultyCluster):
        async def walk(self, of: Kind, **named: Any) -> AsyncIterator[Object]:
            if of.kind == kind:
                raise ClusterError("the answer is too large")
            async for obj in world.cluster.walk(of, **named):
                yield obj

    async def begun() -> bool:
        return bool(await world.status())

    engine = Engine(Forgetful(world.cluster), world.settings, clock=world.clock, listed=listed)
    async with running(engine):
        await until(begun, 5)
    assert not listed.is_set()


async def test_a_resync_leaves_jobs_that_have_ended_in_peace() -> None:
    world = World()
    await world.create()
    raw = await world.cluster.read(FINE_TUNE_JOB, Key("ml", "tune"))
    assert raw is not None
    world.cluster.set_status(FINE_TUNE_JOB, Key("ml", "tune"), {"phase": "Succeeded"})
    assert await world.engine.resync() == 0


async def test_a_closed_gate_holds_everything_back() -> None:
    world, gate = World(), asyncio.Event()
    await world.create()
    engine = Engine(world.cluster, world.settings, clock=world.clock, gate=gate)
    async with running(engine):
        engine.put(Key("ml", "tune"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert await world.status() == {}
        gate.set()

        async def begun() -> bool:
            return bool(await world.status())

        await until(begun)


async def test_a_resync_spreads_its_looks_over_time_so_that_news_need_not_wait_for_them() -> None:
    world = World(admit=admit_all)
    for number in range(10):
        await world.cluster.create(manifest(f"job-{number}"))
    assert await world.engine.resync() == 10
    assert len(world.engine.queue) == 1
    await world.cluster.create(manifest("news"))
    world.engine.put(Key("ml", "news"))
    taken = [world.engine.queue.take() for _ in range(3)]
    assert taken == [Key("ml", "news"), Key("ml", "job-0"), None]
    world.clock.forward(world.settings.resync_seconds / 2)
    assert world.engine.queue.take() is not None
    assert len(world.engine.queue) == 8


# --- progress --------------------------------------------------------------------------------------------------------


class Pods:
    """Answers progress reads and notes who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.now = 0.0
        self.answer: Progress | None = Progress(stage=Stage.TRAINING, step=1)

    async def read_progress(self, pod: Object) -> Progress | None:
        self.asked.append(pod["metadata"]["uid"])
        return self.answer


def poller_of(pods: Pods, told: list[Key]) -> ProgressPoller:
    return ProgressPoller(
        pods,  # type: ignore[arg-type]
        interval=10,
        rate=1e6,
        pace=30,
        patience=25,
        changed=told.append,
        clock=lambda: pods.now,
    )


def pod(uid: str) -> Object:
    return {"metadata": {"name": "p", "uid": uid}}


async def test_a_pod_is_asked_once_an_interval_and_news_are_told_once() -> None:
    pods, told, key = Pods(), [], Key("ml", "a")
    poller = poller_of(pods, told)
    assert poller.latest(key, pod("1")) is None
    for second in range(25):
        pods.now = float(second)
        await poller.poll_due()
    assert pods.asked == ["1", "1", "1"]
    assert told == [key]
    assert poller.latest(key, pod("1")) == pods.answer


async def test_numbers_are_told_at_a_pace_and_all_else_at_once() -> None:
    pods, told, key = Pods(), [], Key("ml", "a")
    poller = poller_of(pods, told)
    poller.latest(key, pod("1"))
    times = []
    for second in range(0, 100, 10):
        pods.now, before = float(second), len(told)
        stage = Stage.TRAINING if second < 80 else Stage.EXPORTING
        pods.answer = Progress(stage=stage, step=second, heartbeat_age_seconds=0.1 * second)
        await poller.poll_due()
        times += [second] * (len(told) - before)
    assert times == [0, 30, 60, 80]


async def test_that_a_pod_falls_silent_is_told_once_and_that_it_speaks_again_as_well() -> None:
    pods, told, key = Pods(), [], Key("ml", "a")
    poller = poller_of(pods, told)
    poller.latest(key, pod("1"))
    answer, times = pods.answer, []
    for second in range(0, 100, 10):
        pods.now, before = float(second), len(told)
        pods.answer = None if 10 <= second < 80 else answer
        await poller.poll_due()
        times += [second] * (len(told) - before)
    # The first try without an answer is at 10.
    assert times == [0, 40, 80]


async def test_progress_of_a_replaced_pod_is_forgotten() -> None:
    pods, told, key = Pods(), [], Key("ml", "a")
    poller = poller_of(pods, told)
    poller.latest(key, pod("1"))
    await poller.poll_due()
    assert poller.latest(key, pod("2")) is None
    poller.forget(key)
    assert await poller.poll_due() == 0


async def test_silence_is_the_time_of_the_tries_that_were_left_unanswered() -> None:
    pods, told, key = Pods(), [], Key("ml", "a")
    poller = poller_of(pods, told)
    assert poller.silence(key) == 0
    poller.latest(key, pod("1"))
    await poller.poll_due()
    pods.answer = None
    for second in (30.0, 40.0, 50.0):
        pods.now = second
        await poller.poll_due()
    assert poller.silence(key) == 20
    assert poller.latest(key, pod("1")) is not None
    pods.answer, pods.now = Progress(stage=Stage.TRAINING, step=2), 60.0
    await poller.poll_due()
    assert poller.silence(key) == 0


async def test_a_pod_that_nobody_has_asked_is_not_called_silent() -> None:
    pods, key = Pods(), Key("ml", "a")
    pods.answer = None
    poller = poller_of(pods, [])
    poller.latest(key, pod("1"))
    pods.now = 1000.0
    assert poller.silence(key) == 0
    await poller.poll_due()
    assert poller.silence(key) == 0
    # One try more, which comes late, is not several.
    pods.now = 2000.0
    await poller.poll_due()
    assert poller.silence(key) == 20


# --- settings and endpoints ------------------------------------------------------------------------------------------


def test_flags_beat_the_environment_which_beats_the_defaults() -> None:
    environ = {"FINETUNE_OPERATOR_WORKERS": "3", "FINETUNE_OPERATOR_NAMESPACES": "a, b"}
    settings = load(["--workers", "5"], environ)
    assert (settings.workers, settings.namespaces, settings.http_port) == (5, ("a", "b"), 8080)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORKERS", "0", "too small"),
        ("WORKERS", "many", "no int"),
        ("IMAGE_PULL_POLICY", "Sometimes", "IfNotPresent, Always, Never"),
    ],
)
def test_a_setting_that_cannot_work_is_named(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=f"FINETUNE_OPERATOR_{name}") as caught:
        load([], {f"FINETUNE_OPERATOR_{name}": value})
    assert words in str(caught.value)


async def test_endpoints_tell_metrics() -> None:
    metrics = Metrics()
    for name, phase in (("a", "Running"), ("b", "Running"), ("c", "Failed")):
        metrics.jobs.see({**manifest(name), "status": {"phase": phase}})
    async with TestClient(TestServer(application(metrics, Health(Watches(lambda: 0.0))))) as client:
        text = await (await client.get("/metrics")).text()
    assert 'finetune_operator_jobs{phase="Running"} 2.0' in text
    assert 'finetune_operator_jobs{phase="Queued"} 0.0' in text


async def test_a_stop_finishes_the_pass_under_way_and_begins_no_other() -> None:
    world = World()
    for name in ("first", "second"):
        await world.cluster.create(manifest(name))
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(FaultyCluster):
        async def create(self, obj: Object) -> Object:
            begun.set()
            await go_on.wait()
            return await world.cluster.create(obj)

    world.settings = dataclasses.replace(world.settings, workers=1)
    engine = world.operator(Slow(world.cluster))
    async with running(engine):
        await begun.wait()
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        go_on.set()
        await drained
        engine.put(Key("ml", "second"))
        for _ in range(50):
            await asyncio.sleep(0)
    statuses = [await world.status(Key("ml", name)) for name in ("first", "second")]
    assert [bool(status) for status in statuses] == [True, False]
