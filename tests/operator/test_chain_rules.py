"""What a job waits for, and what it finds: (job, those it names, now) -> decision."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.cluster.port import Object
from finetune_operator.lifecycle import Create, Decision, decide
from finetune_operator.observed import Observed
from finetune_operator.plan import plan
from finetune_operator.references import Named, Reference, named, references
from finetune_operator.settings import Settings
from tests.operator.test_lifecycle import NOW, workload
from tests.operator.world import manifest, typed

SFT: Object = {"uri": "job://sft"}
PROBED = {"type": "Partial", "select": {"angle": {"from": "job://probe", "topK": 4}}}
MODEL, ANGLE = "spec.model.uri", "spec.strategy.select.angle.from"


def other(phase: str = "", *, reason: str = "", delivered: Object | None = None, **spec: Any) -> Named:
    """A job that is named; unless told otherwise it trains a whole model."""
    raw = manifest("sft", **{"strategy": {"type": "Full"}, "output": {"uri": "s3://out/sft/"}, **spec})
    return named(
        {**raw, "status": {"phase": phase, "reason": reason, "message": "S3 is away", "output": delivered or {}}}
    )


def look(status: FineTuneJobStatus | None = None, spec: Object | None = None, **others: Named | None) -> Decision:
    job = typed(**(spec or {"model": SFT}))
    job.status = status or FineTuneJobStatus()
    return decide(job, Observed(named=others), NOW, Settings())


# --- what a job waits for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "reason", "message"),
    [
        pytest.param(
            {"sft": None},
            "ReferencedJobMissing",
            "spec.model.uri: there is no FineTuneJob sft in namespace ml; create it",
            id="a job that is not there",
        ),
        pytest.param(
            {"sft": other()}, "WaitingForJob", "Waiting for job sft (spec.model.uri), which is new", id="a new job"
        ),
        pytest.param(
            {"sft": other("Running")},
            "WaitingForJob",
            "Waiting for job sft (spec.model.uri), which is Running",
            id="a job that runs",
        ),
        pytest.param(
            {"sft": other("Suspended")},
            "WaitingForJob",
            "Waiting for job sft (spec.model.uri), which is Suspended",
            id="a job that somebody has suspended",
        ),
        pytest.param(
            {"sft": other("Blocked", reason="WaitingForJob", model={"uri": "job://base"}), "base": other("Running")},
            "WaitingForJob",
            "Waiting for job sft (spec.model.uri), which is Blocked",
            id="a job that waits too",
        ),
        pytest.param(
            {"sft": other("Blocked", reason="Refused")},
            "WaitingForJob",
            "Waiting for job sft (spec.model.uri), which is Blocked",
            id="a job that waits for quota",
        ),
        pytest.param(
            {"sft": other("Failed")},
            "ReferencedJobFailed",
            "spec.model.uri: job sft has failed (S3 is away); delete it and create it anew",
            id="a job that has failed",
        ),
        pytest.param(
            {"sft": other("Blocked", reason="ReferencedJobMissing", model={"uri": "job://base"}), "base": None},
            "ReferencedJobBlocked",
            "spec.model.uri: job sft cannot start itself (ReferencedJobMissing); its own status says why",
            id="a job that waits in vain",
        ),
        pytest.param(
            {"sft": other("Succeeded", delivered={"uri": "s3://out/sft/adapter", "kind": "adapter"})},
            "ReferencedJobHasNoModel",
            "spec.model.uri: job sft delivers an adapter, and a job goes on from a whole model only; create it anew "
            "with a strategy that trains the model, or name another",
            id="an adapter, whatever one thought of the strategy",
        ),
        pytest.param(
            {"sft": other("Running", strategy={"type": "LoRA"})},
            "ReferencedJobHasNoModel",
            "spec.model.uri: job sft delivers an adapter, and a job goes on from a whole model only; create it anew "
            "with output.merge: true, or name another",
            id="an adapter to come, before its hours of training",
        ),
        pytest.param(
            {"sft": other("Blocked", model={"uri": "job://tune"})},
            "CircularReference",
            "spec.model.uri: these jobs wait for each other: tune -> sft -> tune; delete one of them",
            id="two jobs that wait for each other",
        ),
        pytest.param(
            {"sft": other(strategy=PROBED), "probe": other("Blocked", model={"uri": "job://tune"})},
            "CircularReference",
            "spec.model.uri: these jobs wait for each other: tune -> sft -> probe -> tune; delete one of them",
            id="three jobs in a circle",
        ),
    ],
)
def test_a_job_is_blocked_by(others: dict[str, Named | None], reason: str, message: str) -> None:
    decision = look(**others)
    assert decision.action is None
    assert (decision.status.phase, decision.status.reason, decision.status.message) == (Phase.BLOCKED, reason, message)
    # Whom a person must help is told of by an event, once.
    assert [event.reason for event in decision.events] == ([] if reason == "WaitingForJob" else [reason])
    assert look(decision.status, **others).events == ()


@pytest.mark.parametrize(
    ("done", "place"),
    [
        pytest.param(
            other("Succeeded", delivered={"uri": "s3://out/sft/model", "kind": "model"}),
            "s3://out/sft/model",
            id="a model",
        ),
        pytest.param(
            other("Succeeded", delivered={"uri": "s3://moved/model", "kind": "model"}),
            "s3://moved/model",
            id="where it says",
        ),
        pytest.param(
            other(
                "Succeeded",
                strategy={"type": "QLoRA"},
                output={"uri": "s3://out/sft", "merge": True},
            ),
            "s3://out/sft/model",
            id="a merged adapter",
        ),
        pytest.param(other("Succeeded"), "s3://out/sft/model", id="a model, though the pod's last word was lost"),
    ],
)
def test_a_job_that_has_succeeded_is_followed_to(done: Named, place: str) -> None:
    decision = look(sft=done)
    assert (decision.status.phase, decision.status.reason) == (Phase.STARTING, "ReferencesFound")
    assert decision.status.references == {MODEL: place}
    assert decision.status.message == f"spec.model.uri is {place}, of job sft"
    assert decision.requeue_after == 0
    assert look(decision.status).action == Create(1)


@pytest.mark.parametrize(
    ("probe", "place"),
    [
        pytest.param(other("Succeeded"), "s3://out/sft/report/angles.json", id="the report of a model"),
        pytest.param(
            other("Succeeded", strategy={"type": "IA3"}, output={"uri": "s3://out/sft", "merge": True}),
            "s3://out/sft/model",
            id="a merged model, since the report of an adapter has no angles",
        ),
    ],
)
def test_an_angle_is_read_from(probe: Named, place: str) -> None:
    assert look(spec={"strategy": PROBED}, probe=probe).status.references == {ANGLE: place}


def test_an_adapter_has_no_angles() -> None:
    held = look(spec={"strategy": PROBED}, probe=other("Running", strategy={"type": "PromptTuning"})).status
    assert (held.reason, held.message) == (
        "ReferencedJobHasNoModel",
        f"{ANGLE}: job probe delivers an adapter, and angles are those of a whole model; create it anew with a "
        "strategy that trains the model, or name another",
    )


def test_all_that_is_named_must_have_succeeded_and_what_needs_a_person_is_told_first() -> None:
    spec = {"model": SFT, "strategy": PROBED}
    assert look(spec=spec, sft=other("Running"), probe=other("Failed")).status.reason == "ReferencedJobFailed"
    assert look(spec=spec, sft=other("Succeeded"), probe=other("Running")).status.reason == "WaitingForJob"
    both = look(spec=spec, sft=other("Succeeded"), probe=other("Succeeded")).status.references
    assert both.keys() == {MODEL, ANGLE}


def test_what_a_job_has_started_with_is_not_asked_for_again() -> None:
    started = FineTuneJobStatus(
        phase=Phase.SUSPENDED, attempt=1, workload="job-1", references={MODEL: "s3://out/sft/model"}
    )
    job = typed(model=SFT)
    job.status = started
    assert decide(job, Observed(workload(suspended=True)), NOW, Settings()).status.references == started.references


def test_a_suspended_job_waits_for_nobody() -> None:
    decision = look(spec={"model": SFT, "suspend": True})
    assert (decision.status.phase, decision.status.reason) == (Phase.SUSPENDED, "Suspended")


def test_a_job_of_another_release_is_read_as_far_as_it_can_be() -> None:
    found = named({"spec": {"strategy": ["Telepathy"], "output": {"uri": "s3://o/"}}, "status": {"phase": "Dreaming"}})
    assert (found.phase, found.strategy, found.uri, found.names) == ("Dreaming", "", "s3://o", ())


# --- what becomes of it ----------------------------------------------------------------------------------------------


def test_the_trainer_sees_places_and_the_pod_has_their_volumes() -> None:
    job = typed(model=SFT, strategy=PROBED)
    assert references(job.spec) == (Reference(MODEL, "sft"), Reference(ANGLE, "probe"))
    job.status.references = {MODEL: "pvc://models/sft/model", ANGLE: "pvc://reports/probe/report/angles.json"}
    manifests = plan(job, Settings())
    spec = json.loads(manifests.config_map["data"]["job.json"])["spec"]
    assert spec["model"]["uri"] == "pvc://models/sft/model"
    assert spec["strategy"]["select"]["angle"]["from"] == "pvc://reports/probe/report/angles.json"
    pod = manifests.workload["spec"]["template"]["spec"]
    claims = [item["persistentVolumeClaim"] for item in pod["volumes"] if "persistentVolumeClaim" in item]
    assert claims == [{"claimName": "models", "readOnly": True}, {"claimName": "reports", "readOnly": True}]
    assert job.spec.model.uri == "job://sft"
