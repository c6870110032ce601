"""Jobs that begin with what others deliver, over the in-memory cluster: held, woken, and fixed to what was found."""

from __future__ import annotations

import json

import pytest

from finetune_operator.cluster.port import CONFIG_MAP, EVENT, FINE_TUNE_JOB, JOB, Key, Object
from finetune_operator.reconcile import MAX_NAMED, Reconciler
from finetune_operator.settings import Settings
from finetune_operator.waiters import Waiters
from tests.operator.test_engine import running, until
from tests.operator.world import KEY, FaultyCluster, Killed, World, admit_all, manifest

MODEL, SFT = "spec.model.uri", {"uri": "job://sft"}
FULL = {"strategy": {"type": "Full"}, "output": {"uri": "s3://out/sft"}}
SUCCESS = json.dumps(
    {
        "exitCode": 0,
        "result": {"job": "sft", "steps": 9, "output": {"uri": "s3://out/sft/model", "kind": "model"}},
    }
)


def of(name: str) -> Key:
    return Key(KEY.namespace, name)


async def phase(world: World, name: str) -> tuple[str | None, str | None]:
    status = await world.status(of(name))
    return status.get("phase"), status.get("reason")


async def job_json(world: World, name: str) -> Object:
    config_map = await world.cluster.read(CONFIG_MAP, of(f"{name}-job"))
    assert config_map is not None
    found: Object = json.loads(config_map["data"]["job.json"])
    return found


async def delete(world: World, name: str) -> None:
    raw = await world.cluster.read(FINE_TUNE_JOB, of(name))
    assert raw is not None
    await world.cluster.delete(FINE_TUNE_JOB, of(name), raw["metadata"]["uid"])


async def chained() -> World:
    """`tune` goes on from what `sft` delivers, and `sft` runs."""
    world = World()
    await world.cluster.create(manifest("sft", **FULL))
    await world.create(model=SFT)
    await world.settle(of("sft"))
    await world.settle()
    return world


async def test_a_chain_goes_from_the_first_job_to_the_last() -> None:
    world = await chained()
    assert await phase(world, "sft") == ("Running", "Running")
    assert await phase(world, "tune") == ("Blocked", "WaitingForJob")
    assert (await world.conditions())["Valid"] == "True"
    assert await world.cluster.read(JOB, KEY) is None
    await world.end(0, SUCCESS)
    await world.settle(of("sft"))
    await world.settle()
    assert await phase(world, "tune") == ("Running", "Running")
    assert (await world.status())["references"] == {MODEL: "s3://out/sft/model"}
    assert (await job_json(world, "tune"))["spec"]["model"]["uri"] == "s3://out/sft/model"


async def test_what_was_found_stays_whatever_happens_to_the_job_that_was_named() -> None:
    world = await chained()
    await world.end(0, SUCCESS)
    await world.settle(of("sft"))
    await world.settle()
    await delete(world, "sft")
    await world.cluster.create(manifest("sft", strategy={"type": "Full"}, output={"uri": "s3://other/place"}))
    await world.set_suspend(True)
    await world.settle()
    config_map = await world.cluster.read(CONFIG_MAP, of("tune-job"))
    assert config_map is not None
    await world.cluster.delete(CONFIG_MAP, of("tune-job"), config_map["metadata"]["uid"])
    await world.set_suspend(False)
    await world.settle()
    assert await phase(world, "tune") == ("Running", "Running")
    assert (await job_json(world, "tune"))["spec"]["model"]["uri"] == "s3://out/sft/model"


async def test_a_job_that_runs_asks_for_no_other() -> None:
    world = await chained()
    await world.end(0, SUCCESS)
    await world.settle(of("sft"))
    await world.settle()
    counting = FaultyCluster(world.cluster)
    world.engine = world.operator(counting)
    await world.pass_once()
    reads = counting.calls
    await delete(world, "sft")
    await world.pass_once()
    assert counting.calls == 2 * reads
    assert (await world.phase())[0] == "Running"


async def test_those_who_wait_are_woken_by_a_phase_and_by_nothing_else() -> None:
    world = World(admit=admit_all)
    await world.create(model=SFT)
    woken: list[Key] = []
    reconciler = Reconciler(
        world.cluster, world.settings, world.clock, world.engine.poller, wake=woken.append, told=world.engine
    )
    world.engine.reconciler = reconciler
    assert await reconciler.reconcile(KEY) is None
    assert await phase(world, "tune") == ("Blocked", "ReferencedJobMissing")
    await world.cluster.create(manifest("sft", **FULL))
    await world.settle(of("sft"))
    # Starting, and Running.
    assert woken == [KEY, KEY]
    await reconciler.reconcile(KEY)
    world.clock.forward(100)
    await world.settle(of("sft"))
    assert woken == [KEY, KEY]
    await delete(world, "sft")
    await reconciler.reconcile(of("sft"))
    assert woken == [KEY, KEY, KEY]
    await delete(world, "tune")
    await reconciler.reconcile(KEY)
    await reconciler.reconcile(of("sft"))
    assert woken == [KEY, KEY, KEY]


async def test_the_engine_brings_a_chain_of_four_to_its_end_without_a_resync() -> None:
    world = World(Settings(resync_seconds=1e6), admit=admit_all)
    world.cluster.subscribe(
        lambda change: world.engine.put(
            of((change.obj["metadata"].get("labels") or {}).get("finetune.dev/job", change.key.name))
        )
    )
    names = ["d", "c", "b", "a"]
    async with running(world.engine):
        for number, name in enumerate(names):
            model = {"uri": f"job://{names[number + 1]}"} if name != "a" else {"uri": "s3://models/base"}
            await world.cluster.create(
                manifest(name, model=model, strategy={"type": "Full"}, output={"uri": f"s3://out/{name}"})
            )

        async def only_runs(name: str) -> bool:
            await world.node.settle()
            phases = [(await phase(world, other))[0] for other in names]
            done, waiting = len(names) - 1 - names.index(name), names.index(name)
            return phases == ["Blocked"] * waiting + ["Running"] + ["Succeeded"] * done

        for name in reversed(names):
            await until(lambda name=name: only_runs(name))
            output = {"uri": f"s3://out/{name}/model", "kind": "model"}
            await world.end(0, json.dumps({"exitCode": 0, "result": {"job": name, "steps": 9, "output": output}}))

        async def over() -> bool:
            await world.node.settle()
            return {(await phase(world, name))[0] for name in names} == {"Succeeded"}

        await until(over)
    assert (await job_json(world, "d"))["spec"]["model"]["uri"] == "s3://out/c/model"


async def test_a_failure_is_handed_down_and_a_job_created_anew_is_waited_for() -> None:
    world = await chained()
    await world.cluster.create(manifest("last", model={"uri": "job://tune"}, output={"uri": "s3://out/last"}))
    await world.end(65, json.dumps({"exitCode": 65, "cause": "Data", "message": "line 3 is cut", "advice": "mend it"}))
    for name in ("sft", "tune", "last"):
        await world.settle(of(name))
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Blocked", "ReferencedJobFailed")
    assert "job sft has failed (line 3 is cut. Advice: mend it)" in status["message"]
    assert await phase(world, "last") == ("Blocked", "ReferencedJobBlocked")
    warnings = [event for event in await world.cluster.list(EVENT, KEY.namespace, {}) if event["type"] == "Warning"]
    assert [event["reason"] for event in warnings] == ["Failed", "ReferencedJobFailed", "ReferencedJobBlocked"]
    await delete(world, "sft")
    await world.cluster.create(manifest("sft", **FULL))
    await world.node.settle()
    for name in ("sft", "tune"):
        await world.settle(of(name))
    assert await phase(world, "tune") == ("Blocked", "WaitingForJob")


async def test_jobs_in_a_circle_say_so_and_going_round_ends() -> None:
    world = World(admit=admit_all)
    counting = FaultyCluster(world.cluster)
    world.engine = world.operator(counting)
    names = [f"j{number:02}" for number in range(MAX_NAMED + 10)]
    for name, following in zip(names[:3], [*names[1:3], names[0]], strict=True):
        await world.cluster.create(manifest(name, model={"uri": f"job://{following}"}, strategy={"type": "Full"}))
    for name in names[:3]:
        await world.pass_once(of(name))
    assert (await world.status(of("j00")))["message"] == (
        "spec.model.uri: these jobs wait for each other: j00 -> j01 -> j02 -> j00; delete one of them"
    )
    for name, following in zip(names[3:], [*names[4:], names[3]], strict=True):
        await world.cluster.create(manifest(name, model={"uri": f"job://{following}"}, strategy={"type": "Full"}))
    before = counting.calls
    await world.pass_once(of("j03"))
    assert await phase(world, "j03") == ("Blocked", "WaitingForJob")
    # Beside those it waits for: itself, its Job, its pods, its status.
    assert counting.calls - before == MAX_NAMED + 4


async def run_chain(fail_at: int | None, after: bool) -> tuple[Object, int]:
    """Both jobs to their ends, by an operator that is killed once."""
    world = World(admit=admit_all)
    faulty = FaultyCluster(world.cluster, fail_at, after)
    world.engine = world.operator(faulty)
    await world.cluster.create(manifest("sft", **FULL))
    await world.create(model=SFT)
    for _ in range(2):
        await survive(world)
        await world.end(0, SUCCESS)
    await survive(world)
    status = await world.status()
    spec = (await job_json(world, "tune"))["spec"]
    return {
        "phase": status["phase"], "attempt": status["attempt"], "references": status["references"],
        "model": spec["model"]["uri"], "jobs": len(await world.cluster.list(JOB, None, {})),
    }, faulty.calls  # fmt: skip


async def survive(world: World) -> None:
    while True:
        try:
            for name in ("sft", "tune", "sft", "tune"):
                await world.settle(of(name))
            return
        except (Killed, BaseExceptionGroup):  # a task group wraps it
            world.engine = world.operator(world.cluster)


@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after it took effect"])
async def test_a_chain_survives_an_operator_that_is_killed_at_any_of_its_api_calls(after: bool) -> None:
    expected, calls = await run_chain(None, after)
    assert expected == {
        "phase": "Succeeded", "attempt": 1, "references": {MODEL: "s3://out/sft/model"},
        "model": "s3://out/sft/model", "jobs": 2,
    }  # fmt: skip
    for n in range(1, calls + 1):
        assert (await run_chain(n, after))[0] == expected, f"killed at call {n}"


# --- who waits for whom ----------------------------------------------------------------------------------------------


def test_waiters_are_found_by_those_they_wait_for_and_forgotten_with_them() -> None:
    a, b, c = of("a"), of("b"), of("c")
    waiters = Waiters()
    waiters.set(a, [b, c])
    waiters.set(c, [b])
    assert (waiters.of(b), waiters.of(c), waiters.of(a)) == ((a, c), (a,), ())
    waiters.set(a, [c])
    assert (waiters.of(b), waiters.of(c)) == ((c,), (a,))
    waiters.set(a, [])
    waiters.set(c, [])
    assert (waiters.of(b), waiters.of(c)) == ((), ())
    assert waiters.__dict__ == Waiters().__dict__
