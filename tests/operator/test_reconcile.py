"""One job through the whole control plane over the in-memory cluster."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.contract import CheckpointRef, Progress, Stage
from finetune_operator.cluster.port import (
    CONFIG_MAP,
    EVENT,
    FINE_TUNE_JOB,
    JOB,
    POD,
    SERVICE,
    ForbiddenError,
    InvalidError,
    Key,
    Object,
)
from finetune_operator.observed import PODS_SECONDS
from finetune_operator.reconcile import NameTakenError
from finetune_operator.settings import Settings
from tests.operator.world import KEY, RESULT, FaultyCluster, Killed, World, admit_all, manifest
from tests.support.scripted import ScriptedRuntime

SUCCESS = json.dumps(RESULT)
GANG: Object = {"resources": {"nodes": 2}, "runPolicy": {"preflight": "Never"}}
FENCED = json.dumps({"operatorNamespace": "system", "operatorLabels": {"app": "a"}, "ingress": [], "egress": []})
"""The setting by which each job gets a NetworkPolicy."""


async def started(runtime: ScriptedRuntime | None = None, **spec: Any) -> World:
    world = World(runtime=runtime)
    await world.create(**spec)
    await world.settle()
    assert await world.phase() == ("Running", "Running")
    return world


# --- the main path ---------------------------------------------------------------------------------------------------


async def test_a_job_goes_from_creation_to_success_with_the_trainers_result() -> None:
    world = await started()
    await world.end(0, SUCCESS)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Succeeded", "Succeeded")
    assert status["message"] == "The adapter is at s3://out/tune/adapter after 40 steps, eval_loss 1.831"
    assert status["output"] == RESULT["result"]["output"]
    assert (status["metrics"], status["baseline"]) == ({"eval_loss": "1.831"}, {"eval_loss": "2.5"})
    assert (status["progress"]["steps"], status["progress"]["loss"]) == ("40/40", "1.707"), "though none was read"
    assert status["completionTime"] == "2026-01-01T12:00:00Z"
    assert await world.conditions() == {
        "Valid": "True", "Scheduled": "True", "Running": "False", "Suspended": "False", "Complete": "True",
        "Failed": "False", "Stalled": "False",
    }  # fmt: skip
    assert await world.events() == [("Succeeded", status["message"])]


async def test_success_says_why_training_ended_early_and_whose_weights_are_delivered() -> None:
    world = await started()
    early = {"exportedStep": 30, "stoppedEarly": "eval_loss did not improve in 3 evaluations"}
    await world.end(0, json.dumps({"exitCode": 0, "result": RESULT["result"] | early}))
    await world.settle()
    assert (await world.status())["message"] == (
        "The adapter is at s3://out/tune/adapter after 40 steps (stopped early: eval_loss did not improve in 3 "
        "evaluations), with the weights of step 30, eval_loss 1.831"
    )


@pytest.mark.parametrize(("nodes", "children"), [(1, 3), (2, 4)], ids=["one pod", "a gang, with its Service"])
async def test_from_creation_to_success_few_writes_are_enough_one_of_them_for_progress(
    nodes: int, children: int
) -> None:
    world = World(Settings(network_policy=FENCED))
    counting = FaultyCluster(world.cluster)
    world.engine = world.operator(counting)
    await world.create(**{**GANG, "resources": {"nodes": nodes}})
    await world.settle()
    world.progress = Progress(stage=Stage.TRAINING, step=20, total_steps=40, loss=2.0)
    world.clock.forward(40)
    await world.settle()
    assert (await world.status())["progress"]["steps"] == "20/40"
    await world.end(0, SUCCESS)
    await world.settle()
    assert (await world.phase())[0] == "Succeeded"
    assert counting.writes == ["create"] * children + ["patch"] * 4 + ["emit"]


async def test_a_new_job_of_one_pod_is_started_after_two_reads() -> None:
    world = World()
    counting = FaultyCluster(world.cluster)
    world.engine = world.operator(counting)
    await world.create()
    await world.pass_once()
    assert counting.asked == ["FineTuneJob", "Pod"]
    assert (await world.phase())[0] == "Starting"


async def test_a_job_whose_operator_died_before_the_first_status_is_taken_over_as_it_runs_by_then() -> None:
    world = World()
    world.engine = world.operator(FaultyCluster(world.cluster, fail_at=5))
    await world.create()
    with pytest.raises(Killed, match="patch"):
        await world.pass_once()
    await world.node.settle()
    workload = await world.workload()
    world.engine = world.operator(world.cluster)
    await world.pass_once()
    assert (await world.phase())[0] == "Running"
    assert (await world.status())["workload"] == workload["metadata"]["uid"]


async def test_a_pass_over_a_job_where_nothing_happened_writes_nothing() -> None:
    world = await started()
    counting = FaultyCluster(world.cluster)
    world.engine = world.operator(counting)
    for _ in range(3):
        await world.pass_once()
    assert counting.writes == []


async def test_children_belong_to_the_job_and_go_with_it() -> None:
    world = await started(**GANG)
    job = await world.cluster.read(FINE_TUNE_JOB, KEY)
    assert job is not None
    for kind, name in ((CONFIG_MAP, "tune-job"), (SERVICE, "tune"), (JOB, "tune")):
        child = await world.cluster.read(kind, Key("ml", name))
        assert child is not None
        assert child["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    await world.cluster.delete(FINE_TUNE_JOB, KEY, job["metadata"]["uid"])
    assert await world.pass_once() is None
    await world.node.settle()
    for kind in (CONFIG_MAP, SERVICE, JOB, POD):
        assert await world.cluster.list(kind, None, {}) == []


async def test_a_lost_result_is_still_a_success_that_says_where_the_details_are() -> None:
    world = await started()
    await world.end(0, "")
    await world.settle()
    assert (await world.phase())[0] == "Succeeded"
    assert "s3://out/tune/result.json" in (await world.status())["message"]


# --- progress --------------------------------------------------------------------------------------------------------


async def test_progress_is_written_at_a_bounded_rate_and_a_phase_at_once() -> None:
    world = World(Settings(progress_poll_seconds=10, progress_write_seconds=30))
    counting = FaultyCluster(world.cluster)
    world.engine = world.operator(counting)
    await world.create()
    await world.settle()
    before = len(counting.writes)
    for second in range(120):
        world.clock.forward(1)
        world.progress = Progress(stage=Stage.TRAINING, step=second, total_steps=120)
        await world.engine.poller.poll_due()
        await world.pass_once()
    assert 3 <= len(counting.writes) - before <= 4
    await world.end(0, SUCCESS)
    await world.pass_once()
    assert (await world.phase())[0] == "Succeeded"


async def test_progress_tells_step_loss_and_time_left() -> None:
    world = await started()
    checkpoint = CheckpointRef(uri="s3://out/tune/checkpoints/step-00000100", step=100, time="2026-01-01T12:00:30Z")
    world.progress = Progress(
        stage=Stage.TRAINING, step=120, total_steps=1000, epoch=0.36, loss=1.83456, learning_rate=1.987654e-4,
        tokens_per_second=12345.678, eta_seconds=4980, metrics={"eval_loss": 1.9}, checkpoint=checkpoint,
    )  # fmt: skip
    world.clock.forward(60)
    await world.settle()
    status = await world.status()
    assert status["message"] == "Training: step 120/1000, loss 1.835, 1h23m left"
    assert status["progress"] == {
        "stage": "Training", "step": 120, "totalSteps": 1000, "percent": 12, "steps": "120/1000", "epoch": "0.36",
        "loss": "1.835", "learningRate": "0.000199", "tokensPerSecond": "12346", "etaSeconds": 4980, "eta": "1h23m",
        "updatedAt": "2026-01-01T12:01:00Z",
    }  # fmt: skip
    assert status["checkpoint"]["step"] == 100
    assert status["metrics"] == {"eval_loss": "1.9"}


async def test_progress_of_an_earlier_attempt_is_not_believed() -> None:
    world = await started()
    world.progress = Progress(attempt=7, stage=Stage.TRAINING, step=5, total_steps=10)
    world.clock.forward(60)
    await world.settle()
    assert "progress" not in await world.status()


async def test_a_warning_is_told_at_once_and_once_and_outlives_the_pod_that_said_it() -> None:
    world = await started(runPolicy={"retries": {"infrastructure": 1}})
    world.progress = Progress(stage=Stage.TRAINING, step=1, total_steps=40, warnings=["12 rows were cut"])
    world.clock.forward(40)
    await world.settle()
    assert (await world.status())["warnings"] == ["12 rows were cut"]
    world.clock.forward(11)
    world.progress = world.progress.model_copy(update={"warnings": ["12 rows were cut", "losses part"]})
    await world.settle()
    await world.end(69, json.dumps({"exitCode": 69, "message": "S3 did not answer"}))
    world.progress = Progress(attempt=2, stage=Stage.TRAINING, warnings=["12 rows were cut"])
    await world.settle()
    await world.sit_out_back_off()
    assert await world.phase() == ("Running", "Training")
    # The last one came after the last progress that was read.
    await world.end(0, json.dumps({**RESULT, "warnings": ["12 rows were cut", "no chat template"]}))
    await world.settle()
    status = await world.status()
    assert status["warnings"] == ["losses part", "12 rows were cut", "no chat template"]
    assert status["message"].endswith("eval_loss 1.831 (3 warnings, the last: no chat template)")
    warnings = [message for reason, message in await world.events() if reason == "TrainerWarning"]
    assert warnings == ["12 rows were cut", "losses part", "no chat template"]
    events = await world.cluster.list(EVENT, KEY.namespace, {})
    assert [event["count"] for event in events if event["reason"] == "TrainerWarning"] == [1, 1, 1]


async def test_warnings_are_bounded_however_many_there_are() -> None:
    world = await started()
    for first in (0, 10, 30):
        texts = [f"{number}: {'x' * 600}" for number in range(first, first + 16)]
        world.progress = Progress(stage=Stage.TRAINING, warnings=texts)
        world.clock.forward(40)
        await world.settle()
        assert (await world.status())["warnings"] == [text[:512] for text in texts]
    told = [message for reason, message in await world.events() if reason == "TrainerWarning"]
    assert len(told) == len(set(told)) == 42


# --- suspend, delete -------------------------------------------------------------------------------------------------


async def test_suspended_is_said_only_when_no_pod_is_left_and_resuming_is_a_new_attempt() -> None:
    world = await started(runtime=ScriptedRuntime(stop_code=None))
    await world.set_suspend(True)
    await world.settle()
    assert await world.phase() == ("Running", "Suspending")
    await world.end(75)
    await world.settle()
    assert await world.phase() == ("Suspended", "Suspended")
    assert (await world.conditions())["Suspended"] == "True"
    world.clock.forward(3600)
    await world.set_suspend(False)
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["attempt"], status["restarts"]["total"]) == ("Running", 2, 0)
    assert status["activeSeconds"] == 0
    pods = await world.pods()
    assert [pod["metadata"]["annotations"]["finetune.dev/attempt"] for pod in pods] == ["2"]


async def test_a_job_that_is_created_suspended_has_no_children_until_it_is_resumed() -> None:
    world = World()
    await world.create(suspend=True)
    await world.settle()
    assert await world.phase() == ("Suspended", "Suspended")
    assert await world.cluster.list(JOB, None, {}) == []
    await world.set_suspend(False)
    await world.settle()
    assert await world.phase() == ("Running", "Running")


async def test_the_checkpoint_that_a_stopped_pod_saved_last_is_the_one_in_status() -> None:
    world = await started()
    saved = {"uri": "s3://out/tune/checkpoints/step-00000023", "step": 23, "time": "2026-01-01T12:00:30Z"}
    await world.end(75, json.dumps({"exitCode": 75, "cause": "Disruption", "step": 23, "checkpoint": saved}))
    await world.settle()
    assert (await world.status())["checkpoint"] == saved


async def test_a_running_trainer_is_told_when_fewer_checkpoints_are_to_be_kept() -> None:
    world = await started()
    patch = [{"op": "add", "path": "/spec/checkpoint/keep", "value": 1}]
    await world.cluster.patch(FINE_TUNE_JOB, KEY, patch)
    await world.settle()
    config_map = await world.cluster.read(CONFIG_MAP, Key(KEY.namespace, "tune-job"))
    assert config_map is not None
    assert json.loads(config_map["data"]["job.json"])["spec"]["checkpoint"]["keep"] == 1
    assert (await world.status())["attempt"] == 1


async def test_time_counts_as_active_only_while_it_runs() -> None:
    world = await started()
    world.clock.forward(100)
    await world.set_suspend(True)
    await world.settle()
    world.clock.forward(1000)
    await world.set_suspend(False)
    await world.settle()
    world.clock.forward(50)
    await world.end(0, SUCCESS)
    await world.settle()
    status = await world.status()
    assert status["activeSeconds"] == 150
    assert "activeSince" not in status


# --- incidents -------------------------------------------------------------------------------------------------------


async def test_a_pod_that_is_deleted_is_a_free_restart_with_the_next_attempt() -> None:
    world = await started()
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    await world.sit_out_back_off()
    status = await world.status()
    assert (status["phase"], status["attempt"]) == ("Running", 2)
    assert status["restarts"]["disruption"] == 1
    assert "incident" not in status


async def test_an_infrastructure_failure_is_retried_within_its_budget_and_then_fails_with_advice() -> None:
    world = await started(runPolicy={"retries": {"infrastructure": 2}})
    word = json.dumps({"exitCode": 69, "cause": "Infrastructure", "message": "S3 did not answer", "advice": "look"})
    for attempt in (1, 2, 3):
        await world.sit_out_back_off()
        assert (await world.status())["attempt"] == attempt
        await world.end(69, word)
        await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Failed", "Infrastructure")
    assert status["message"] == (
        "S3 did not answer. Advice: look. Attempt 3; 2 of runPolicy.retries.infrastructure=2 were used"
    )
    assert status["restarts"] == {
        "total": 2, "disruption": 0, "infrastructure": 2, "application": 0, "outOfMemory": 0, "stalled": 0,
    }  # fmt: skip
    assert await world.pods() == []


@pytest.mark.parametrize(("code", "cause"), [(64, "Usage"), (65, "Data"), (77, "Permission"), (80, "Diverged")])
async def test_what_no_budget_changes_fails_at_once(code: int, cause: str) -> None:
    world = await started()
    await world.end(
        code, json.dumps({"exitCode": code, "cause": cause, "message": "line 3 is cut", "advice": "mend it"})
    )
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"], status["message"]) == ("Failed", cause, "line 3 is cut. Advice: mend it")
    assert (await world.conditions())["Failed"] == "True"
    assert status["restarts"]["total"] == 0


async def test_a_job_whose_indexed_job_was_deleted_is_started_again() -> None:
    world = await started()
    workload = await world.workload()
    await world.cluster.delete(JOB, KEY, workload["metadata"]["uid"])
    await world.node.settle()
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["attempt"], status["restarts"]["disruption"]) == ("Running", 2, 1)
    assert status["workload"] == (await world.workload())["metadata"]["uid"] != workload["metadata"]["uid"]


async def test_the_next_attempt_waits_until_the_last_pod_of_the_old_one_is_gone() -> None:
    world = await started(runtime=ScriptedRuntime(stop_code=None))
    pod = (await world.pods())[0]
    await world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
    await world.settle()
    assert await world.phase() == ("Restarting", "Disruption")
    assert (await world.workload())["spec"]["suspend"] is True
    assert len(await world.pods(live=False)) == 1
    world.node.runtime.end(pod["metadata"]["name"], 75)
    await world.settle()
    await world.sit_out_back_off()
    assert (await world.phase())[0] == "Running"


async def test_terminal_means_terminal_whatever_happens_to_the_children() -> None:
    world = await started()
    await world.end(65)
    await world.settle()
    ended = await world.status()
    await world.cluster.delete(JOB, KEY, (await world.workload())["metadata"]["uid"])
    await world.settle()
    assert await world.status() == ended
    assert await world.cluster.list(JOB, None, {}) == []


async def test_an_indexed_job_that_somebody_resumes_after_the_end_is_put_to_sleep_again() -> None:
    world = await started(runPolicy={"retries": {"infrastructure": 0}})
    await world.end(69)
    await world.settle()
    assert (await world.phase())[0] == "Failed"
    await world.cluster.patch(JOB, KEY, [{"op": "replace", "path": "/spec/suspend", "value": False}])
    await world.settle()
    assert (await world.workload())["spec"]["suspend"] is True


async def test_a_namesake_waits_for_the_pods_of_the_job_that_was_deleted_before_it() -> None:
    world = await started(runtime=ScriptedRuntime(stop_code=None))
    job = await world.cluster.read(FINE_TUNE_JOB, KEY)
    assert job is not None
    await world.cluster.delete(FINE_TUNE_JOB, KEY, job["metadata"]["uid"])
    await world.create()
    await world.settle()
    assert await world.phase() == ("Starting", "WaitingForOldPods")
    await world.end(75)
    await world.settle()
    assert await world.phase() == ("Running", "Running")
    assert (await world.status())["attempt"] == 1


async def test_what_a_resumed_attempt_needs_is_there_again_whoever_deleted_it() -> None:
    world = await started()
    await world.set_suspend(True)
    await world.settle()
    config = await world.cluster.read(CONFIG_MAP, Key("ml", "tune-job"))
    assert config is not None
    await world.cluster.delete(CONFIG_MAP, Key("ml", "tune-job"), config["metadata"]["uid"])
    await world.set_suspend(False)
    await world.settle()
    again = await world.cluster.read(CONFIG_MAP, Key("ml", "tune-job"))
    assert again is not None
    assert again["data"] == config["data"]


# --- refusals --------------------------------------------------------------------------------------------------------


class Refusing(FaultyCluster):
    """Refuses to create objects of one kind."""

    def __init__(self, world: World, kind: str, error: Exception) -> None:
        super().__init__(world.cluster)
        self.kind: str | None = kind
        self.error = error
        self.inner = world.cluster

    async def create(self, obj: Object) -> Object:
        if obj["kind"] == self.kind:
            raise self.error
        return await self.inner.create(obj)


async def test_a_quota_makes_a_job_wait_and_say_so() -> None:
    world = World()
    refusing = Refusing(world, "Job", ForbiddenError("exceeded quota: jobs"))
    world.engine = world.operator(refusing)  # type: ignore[arg-type]
    await world.create()
    for _ in range(3):
        with pytest.raises(ForbiddenError):
            await world.pass_once()
    assert await world.phase() == ("Blocked", "Refused")
    assert (await world.status())["message"] == "Waiting, and trying again: exceeded quota: jobs"
    assert [event["count"] for event in await world.cluster.list(EVENT, "ml", {})] == [1]
    refusing.kind = None
    await world.settle()
    assert await world.phase() == ("Running", "Running")


async def test_why_there_are_no_pods_is_asked_when_they_are_overdue_and_not_before() -> None:
    """Events cannot be found by their object: a server reads all of a namespace for it."""

    class Asked(FaultyCluster):
        times = 0

        async def events_of(self, obj: Object) -> list[Object]:
            self.times += 1
            return await world.cluster.events_of(obj)

    world = World(admit=admit_all)
    asked = Asked(world.cluster)
    world.engine = world.operator(asked)  # type: ignore[arg-type]
    await world.create()
    assert await world.pass_once() is None
    # The Job controller has not come to the Job yet, however late that is.
    world.clock.forward(100)
    assert await world.pass_once() is None
    await world.job_is_taken_up()
    again_in = await world.pass_once()
    assert again_in is not None
    assert 0 < again_in <= PODS_SECONDS
    await world.pass_once()
    assert asked.times == 0
    await world.cluster.emit(await world.workload(), "FailedCreate", "exceeded quota: gpus", warning=True)
    world.clock.forward(again_in)
    await world.pass_once()
    assert asked.times == 1
    assert "exceeded quota: gpus" in (await world.status())["message"]


async def test_a_job_that_runs_is_looked_at_when_there_is_news_and_not_by_the_clock() -> None:
    """A thousand of them would cost a hundred passes a second."""
    world = World(admit=admit_all)
    await world.create()
    await world.settle()
    world.progress = Progress(stage=Stage.TRAINING, step=1)
    world.clock.forward(100)
    await world.settle()
    assert (await world.status())["progress"]["step"] == 1
    assert await world.pass_once() is None
    # What is held back is written when its time has come, whether or not more comes.
    world.progress = Progress(stage=Stage.TRAINING, step=2)
    world.clock.forward(10)
    await world.engine.poller.poll_due()
    assert await world.pass_once() == 20
    world.clock.forward(20)
    await world.pass_once()
    assert (await world.status())["progress"]["step"] == 2


async def test_a_manifest_that_the_server_calls_invalid_fails_the_job_with_its_words() -> None:
    world = World()
    world.engine = world.operator(Refusing(world, "Job", InvalidError("tolerations[2].effect: Unsupported")))  # type: ignore[arg-type]
    await world.create()
    with pytest.raises(InvalidError):
        await world.pass_once()
    assert await world.phase() == ("Failed", "Usage")
    assert "tolerations[2].effect" in (await world.status())["message"]
    assert (await world.conditions())["Valid"] == "False"


async def test_an_object_of_somebody_else_is_never_touched() -> None:
    world = World()
    mine = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tune", "namespace": "ml"}, "spec": {"a": 1}}
    before = await world.cluster.create(mine)
    await world.create(**GANG)
    with pytest.raises(NameTakenError):
        await world.pass_once()
    assert await world.phase() == ("Blocked", "Refused")
    assert "Service tune exists and does not belong to this job" in (await world.status())["message"]
    assert await world.cluster.read(SERVICE, KEY) == before


async def test_a_spec_of_another_release_is_reported_and_left_alone() -> None:
    world = World(admit=admit_all)  # as a newer API server does
    raw = manifest()
    raw["spec"]["strategy"]["type"] = "Telepathy"
    await world.cluster.create(raw)
    with pytest.raises(ValueError, match="Telepathy"):
        await world.pass_once()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Blocked", "Unreadable")
    assert "spec.strategy.type" in status["message"]


# --- crashes ---------------------------------------------------------------------------------------------------------


async def scenario(world: World) -> None:
    """Everything that a job can live through: a start, a failure, a suspension, a lost Job and the end."""
    steps = [
        lambda: world.create(
            resources={"nodes": 2}, runPolicy={"preflight": "Never", "retries": {"infrastructure": 1}}
        ),
        lambda: world.end(69, json.dumps({"exitCode": 69, "message": "S3 did not answer"})),
        lambda: world.set_suspend(True),
        lambda: world.set_suspend(False),
        lambda: delete_workload(world),
        lambda: world.end(0, SUCCESS),
    ]
    for step in steps:
        await step()
        await survive(world)


async def delete_workload(world: World) -> None:
    await world.cluster.delete(JOB, KEY, (await world.workload())["metadata"]["uid"])
    await world.node.settle()


async def survive(world: World) -> None:
    """Until rest; a killed operator is started anew, with nothing in its memory, on a cluster without faults."""
    while True:
        try:
            await world.settle()
            await world.sit_out_back_off()
            return
        except (Killed, BaseExceptionGroup):  # a task group wraps it
            world.engine = world.operator(world.cluster)


def end_of(status: Object) -> Object:
    """What must not depend on crashes: all but uids and times."""
    return {name: status[name] for name in ("phase", "reason", "message", "attempt", "restarts", "output", "metrics")}


async def run_scenario(fail_at: int | None, after: bool) -> tuple[Object, FaultyCluster, World]:
    world = World(admit=admit_all)
    faulty = FaultyCluster(world.cluster, fail_at, after)
    world.engine = world.operator(faulty)  # type: ignore[arg-type]
    created: list[str] = []
    world.cluster.subscribe(lambda c: created.append(c.kind.kind) if c.type == "ADDED" else None)
    await scenario(world)
    status = end_of(await world.status())
    status["created"] = {kind: created.count(kind) for kind in ("ConfigMap", "Service", "Job", "FineTuneJob")}
    return status, faulty, world


@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after it took effect"])
async def test_an_operator_killed_at_any_of_its_api_calls_comes_to_the_same_end(after: bool) -> None:
    expected, undisturbed, _ = await run_scenario(None, after)
    assert (expected["phase"], expected["attempt"]) == ("Succeeded", 4)
    assert expected["restarts"]["total"] == 2
    assert expected["created"] == {"ConfigMap": 1, "Service": 1, "Job": 2, "FineTuneJob": 1}
    assert undisturbed.calls > 50
    for n in range(1, undisturbed.calls + 1):
        status, _, world = await run_scenario(n, after)
        assert status == expected, f"killed at call {n}"
        assert len(await world.cluster.list(JOB, None, {})) == 1
