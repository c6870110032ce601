"""A job is checked by a small pod before it takes GPUs: what that finds decides, whatever happens meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.contract import Cause, TerminationMessage
from finetune_operator.cluster.port import EVENT, FINE_TUNE_JOB, JOB, POD, Key, Object
from finetune_operator.plan import plan
from finetune_operator.plan.preflight import LIMIT_SECONDS
from finetune_operator.settings import Settings
from tests.operator.world import KEY, World, typed

GPU = {"resources": {"gpusPerNode": 1, "gpuProduct": "NVIDIA-L4"}}
CHECK = Key("ml", "tune-preflight")
CHECKING = ("Preflight", "Preflight")


async def a_world(**spec: Any) -> World:
    world = World()
    await world.create(**{**GPU, **spec})
    await world.settle()
    return world


async def checkers(world: World) -> list[Object]:
    labels = {"finetune.dev/component": "preflight"}
    return [pod for pod in await world.cluster.list(POD, "ml", labels) if pod["status"]["phase"] == "Running"]


async def ends(world: World, code: int, message: str = "", advice: str = "", warnings: list[str] | None = None) -> None:
    """The check's pod ends with this, and everybody looks."""
    (pod,) = await checkers(world)
    word = TerminationMessage(exit_code=code, message=message, advice=advice, warnings=warnings or [])
    world.node.runtime.end(pod["metadata"]["name"], code, word.model_dump_json(by_alias=True))
    await world.node.settle()
    await world.settle()


async def valid(world: World) -> tuple[str, str, str]:
    (found,) = (item for item in (await world.status())["conditions"] if item["type"] == "Valid")
    return found["status"], found["reason"], found["message"]


# --- what becomes of it ----------------------------------------------------------------------------------------------


async def test_no_gpu_is_taken_before_the_check_has_passed() -> None:
    world = await a_world()
    assert await world.phase() == CHECKING
    assert await world.cluster.read(JOB, KEY) is None
    await ends(world, 0, "model, data and output are reached; it needs 4.1 of 22.5 GiB")
    assert (await world.phase())[0] == "Running"
    assert await valid(world) == (
        "True",
        "PreflightPassed",
        "model, data and output are reached; it needs 4.1 of 22.5 GiB",
    )
    assert ("PreflightPassed", "model, data and output are reached; it needs 4.1 of 22.5 GiB") in await world.events()
    assert (await world.status())["attempt"] == 1


async def test_its_warnings_are_kept_and_told_once() -> None:
    world = await a_world()
    await ends(world, 0, "fine", warnings=["12 of 200 rows are cut to maxLength"])
    assert (await world.status())["warnings"] == ["12 of 200 rows are cut to maxLength"]
    assert [text for reason, text in await world.events() if reason == "TrainerWarning"] == [
        "12 of 200 rows are cut to maxLength"
    ]


@pytest.mark.parametrize(("code", "cause"), [(64, "Usage"), (65, "Data"), (77, "Permission")])
async def test_a_job_that_cannot_work_fails_without_a_gpu(code: int, cause: str) -> None:
    world = await a_world()
    await ends(world, code, "data.jsonl:3: no messages", "repair the row")
    assert await world.phase() == ("Failed", cause)
    assert (await world.status())["message"] == "Preflight: data.jsonl:3: no messages. Advice: repair the row"
    assert (await valid(world))[:2] == ("False", cause)
    assert await world.cluster.read(JOB, KEY) is None
    assert (await world.status())["restarts"]["total"] == 0


async def test_what_does_not_answer_is_asked_three_times() -> None:
    world = await a_world()
    for _ in range(3):
        assert await world.phase() == CHECKING
        await ends(world, 69, "S3 is away")
        world.clock.forward(601)
        await world.node.settle()
        await world.settle()
    assert await world.phase() == ("Failed", Cause.INFRASTRUCTURE.value)
    assert (await valid(world))[:2] == ("True", "Accepted")


def exited(code: int, reason: str = "Error") -> Object:
    terminated = {"exitCode": code, "reason": reason, "finishedAt": "2026-01-01T12:00:00Z"}
    return {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}]}


def disrupted(status: Object) -> Object:
    return {**status, "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]}


@pytest.mark.parametrize(
    "status",
    [
        exited(70),
        exited(137),
        exited(137, "OOMKilled"),
        exited(128, "StartError"),
        {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no device"},
        disrupted(exited(69)),
    ],
    ids=["an error", "SIGKILL", "out of memory", "no start", "rejected by the node", "a node that goes down"],
)
async def test_a_check_that_fails_by_itself_holds_nobody_up(status: Object) -> None:
    world = await a_world()
    (pod,) = await checkers(world)
    world.cluster.set_status(POD, Key("ml", pod["metadata"]["name"]), status)
    child = await world.cluster.read(JOB, CHECK)
    assert child is not None
    failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "too often"}
    world.cluster.set_status(JOB, CHECK, {**child["status"], "conditions": [failed]})
    await world.settle()
    assert (await world.phase())[0] == "Running"
    assert (await valid(world))[:2] == ("True", "PreflightInconclusive")


async def test_the_last_word_of_a_check_counts() -> None:
    world = await a_world()
    await ends(world, 70, "KeyError")
    world.clock.forward(601)
    await world.node.settle()
    await ends(world, 65, "data.jsonl:3: no messages")
    assert await world.phase() == ("Failed", "Data")


async def test_a_check_that_comes_to_no_end_holds_nobody_up() -> None:
    world = await a_world()
    await ends(world, 69, "S3 is away")
    world.clock.forward(LIMIT_SECONDS - 1)
    await world.node.settle()
    await world.settle()
    assert await world.phase() == CHECKING
    world.clock.forward(1)
    assert await world.node.settle() is None
    await world.settle()
    assert (await world.phase())[0] == "Running"
    assert await checkers(world) == []
    text = "Preflight did not come to its end (it took more than 30m0s); the job starts unchecked"
    assert await valid(world) == ("True", "PreflightInconclusive", text)
    told = [(event["reason"], event["type"], event["message"]) for event in await world.cluster.list(EVENT, "ml", {})]
    assert told.count(("PreflightInconclusive", "Warning", text)) == 1


async def test_a_check_for_which_there_is_no_room_holds_nobody_up_for_ever() -> None:
    world = World()
    world.node.kubelet.sync = nothing  # type: ignore[method-assign]
    await world.create(**GPU)
    await world.settle()
    assert await world.phase() == CHECKING
    world.clock.forward(LIMIT_SECONDS)
    await world.node.settle()
    await world.settle()
    assert (await world.phase())[0] == "Starting"
    assert (await valid(world))[:2] == ("True", "PreflightInconclusive")


async def test_a_check_whose_job_somebody_suspends_holds_nobody_up() -> None:
    """kubernetes-sigs/kueue#1568: where Kueue manages Jobs without a queue, what a job makes besides never ran."""
    world = await a_world()
    await world.cluster.patch(JOB, CHECK, [{"op": "add", "path": "/spec/suspend", "value": True}])
    await world.node.settle()
    await world.settle()
    assert (await world.phase())[0] == "Running"
    text = "Preflight did not come to its end (somebody has suspended its Job); the job starts unchecked"
    assert await valid(world) == ("True", "PreflightInconclusive", text)


async def nothing() -> None:
    """A cluster without nodes."""


async def test_a_check_that_was_evicted_is_done_again() -> None:
    world = await a_world()
    (pod,) = await checkers(world)
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    assert await world.phase() == CHECKING
    world.clock.forward(601)
    await world.node.settle()
    await ends(world, 0, "fine")
    assert (await world.phase())[0] == "Running"


# --- whatever happens meanwhile --------------------------------------------------------------------------------------


async def test_another_operator_does_not_check_again() -> None:
    world = await a_world()
    world.engine = world.operator(world.cluster)
    await world.settle()
    assert len(await checkers(world)) == 1
    await ends(world, 0, "fine")
    child = await world.cluster.read(JOB, CHECK)
    assert child is not None
    await world.cluster.delete(JOB, CHECK, child["metadata"]["uid"])
    world.engine = world.operator(world.cluster)
    await world.settle()
    assert await world.cluster.read(JOB, CHECK) is None
    assert (await world.phase())[0] == "Running"


async def test_a_restart_is_not_checked_again() -> None:
    world = await a_world()
    await ends(world, 0, "fine")
    child = await world.cluster.read(JOB, CHECK)
    assert child is not None
    await world.cluster.delete(JOB, CHECK, child["metadata"]["uid"])
    await world.end(75)
    await world.settle()
    await world.sit_out_back_off()
    assert (await world.status())["restarts"]["disruption"] == 1
    assert await world.cluster.read(JOB, CHECK) is None
    assert (await valid(world))[1] == "PreflightPassed"


async def test_a_suspended_job_is_not_checked_and_is_checked_anew_when_it_goes_on() -> None:
    world = await a_world()
    await world.set_suspend(True)
    await world.settle()
    assert await world.phase() == ("Suspended", "Suspended")
    assert await world.cluster.read(JOB, CHECK) is None
    assert await checkers(world) == []
    await world.set_suspend(False)
    await world.settle()
    assert await world.phase() == CHECKING
    await ends(world, 0, "fine")
    assert (await world.phase())[0] == "Running"


async def test_a_job_that_begins_suspended_is_not_checked() -> None:
    world = await a_world(suspend=True)
    assert await world.phase() == ("Suspended", "Suspended")
    assert await world.cluster.read(JOB, CHECK) is None


async def test_deletion_takes_the_check_along() -> None:
    world = await a_world()
    raw = await world.cluster.read(FINE_TUNE_JOB, KEY)
    assert raw is not None
    await world.cluster.delete(FINE_TUNE_JOB, KEY, raw["metadata"]["uid"])
    await world.node.settle()
    await world.pass_once()
    assert await world.cluster.read(JOB, CHECK) is None
    assert await world.cluster.list(POD, "ml", {}) == []


async def test_a_pod_that_cannot_start_says_why() -> None:
    from finetune_operator.cluster.kubelet import StartError

    world = World()
    world.node.runtime.refuse = StartError("ImagePullBackOff", "no such image")
    await world.create(**GPU)
    await world.settle()
    assert await world.phase() == ("Preflight", "ImagePullBackOff")


async def test_a_quota_that_forbids_its_pod_is_told_and_holds_nobody_up_for_ever() -> None:
    world = World()
    await world.create(**GPU)
    await world.pass_once()
    await world.job_is_taken_up(CHECK)
    again_in = await world.pass_once()
    child = await world.cluster.read(JOB, CHECK)
    assert child is not None
    text = 'Error creating: pods "tune-preflight-" is forbidden: exceeded quota: compute, requested: cpu=1'
    await world.cluster.emit(child, "FailedCreate", text, warning=True)
    assert again_in is not None
    world.clock.forward(again_in)
    assert await world.pass_once() == 30.0
    assert await world.phase() == ("Preflight", "PodsRefused")
    assert (await world.status())["message"] == f"The cluster refuses the pod that checks the job: {text}"
    too_long = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "Job was active longer"}
    world.cluster.set_status(JOB, CHECK, {"conditions": [too_long]})
    await world.settle()
    assert (await world.phase())[0] == "Running"
    assert (await valid(world))[:2] == ("True", "PreflightInconclusive")


# --- when, and what it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "checked"),
    [
        ({}, False),
        (GPU, True),
        ({**GPU, "runPolicy": {"preflight": "Never"}}, False),
        ({"runPolicy": {"preflight": "Always"}}, True),
    ],
)
def test_by_default_only_what_takes_gpus_or_many_pods_is_checked(spec: dict[str, Any], checked: bool) -> None:
    manifests = plan(typed(**spec), Settings())
    assert (manifests.preflight is not None) is checked
    assert len(manifests.all()) == 2 + checked


def test_the_pod_is_small_and_stays_off_what_the_job_waits_for() -> None:
    scheduling = {"nodeSelector": {"pool": "gpu"}, "tolerations": [{"key": "pool", "operator": "Exists"}]}
    job = typed(resources={**GPU["resources"], "cpu": "32", "memory": "256Gi"}, scheduling=scheduling)
    child = plan(job, Settings()).preflight
    assert child is not None
    template = child["spec"]["template"]
    pod, (trainer,) = template["spec"], template["spec"]["containers"]
    assert "nodeSelector" not in pod
    assert {"key": "pool", "operator": "Exists"} in pod["tolerations"]
    assert trainer["command"] == ["python", "-m", "finetune_trainer.preflight"]
    assert trainer["resources"] == {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
    assert template["metadata"]["labels"]["finetune.dev/component"] == "preflight"
    assert child["metadata"]["labels"]["finetune.dev/component"] == "preflight"
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_the_pod_never_asks_for_more_than_the_job() -> None:
    child = plan(typed(resources={**GPU["resources"], "cpu": "500m", "memory": "2Gi"}), Settings()).preflight
    assert child is not None
    (trainer,) = child["spec"]["template"]["spec"]["containers"]
    assert trainer["resources"]["requests"] == {"cpu": "500m", "memory": "2Gi"}
