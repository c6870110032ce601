"""Rules of the lifecycle that are easier to see without a cluster: (job, observed, now) -> decision."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.contract import Progress, Stage
from finetune_api.job import FineTuneJob
from finetune_api.status import ConditionType, FineTuneJobStatus, Incident, Phase
from finetune_operator.cluster.port import Object
from finetune_operator.lifecycle import Create, Decision, Delete, ForgetStart, Resume, Suspend, decide, refused
from finetune_operator.lifecycle.text import duration, progress_sentence, progress_status
from finetune_operator.observed import Observed, timestamp
from finetune_operator.settings import Settings
from tests.operator.world import typed

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
SETTINGS = Settings()


def workload(attempt: int = 1, *, nodes: int = 1, suspended: bool = False, uid: str = "job-1", **status: Any) -> Object:
    conditions = [{"type": "Suspended", "status": "True"}] if suspended else []
    template = {"metadata": {"annotations": {"finetune.dev/attempt": str(attempt)}}, "spec": {}}
    return {
        "metadata": {"name": "tune", "namespace": "ml", "uid": uid},
        "spec": {"completions": nodes, "suspend": suspended, "template": template},
        "status": {"conditions": conditions, **status},
    }


def pod(
    index: int = 0, attempt: int = 1, *, code: int | None = None, state: str = "running", age: float = 60
) -> Object:
    """A pod in a state: pending, running, ended (phase and all) or ending (only the container has ended)."""
    ended = state in ("ended", "ending")
    terminated = {"exitCode": code or 0, "finishedAt": timestamp(NOW - timedelta(seconds=age)), "message": ""}
    container = {"terminated": terminated} if ended else ({"running": {}} if state == "running" else {"waiting": {}})
    phase = {"pending": "Pending", "ended": "Failed" if code else "Succeeded"}.get(state, "Running")
    placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": timestamp(NOW - timedelta(seconds=age))}
    annotations = {"finetune.dev/attempt": str(attempt), "batch.kubernetes.io/job-completion-index": str(index)}
    return {
        "metadata": {
            "name": f"tune-{index}-x", "uid": f"pod-{index}-{attempt}", "annotations": annotations,
            "ownerReferences": [{"uid": "job-1", "controller": True}],
        },
        "spec": {},
        "status": {
            "phase": phase, "conditions": [placed], "containerStatuses": [{"name": "trainer", "state": container}],
        },
    }  # fmt: skip


def job(nodes: int = 1, suspend: bool = False, retries: dict[str, int] | None = None, **status: Any) -> FineTuneJob:
    """A job whose status so far is given by field."""
    made = typed(resources={"nodes": nodes}, suspend=suspend, runPolicy={"retries": retries or {}})
    made.metadata.generation = 3
    made.status = FineTuneJobStatus(**status)
    return made


def running(**changes: Any) -> FineTuneJob:
    return job(**{"phase": Phase.RUNNING, "attempt": 1, "workload": "job-1", **changes})


def incident(retry: bool = True) -> Incident:
    return Incident(cause="Infrastructure", message="S3 is away", retry=retry, attempt=1, started_at=timestamp(NOW))


def look(what: FineTuneJob, child: Object | None = None, *pods: Object, progress: Progress | None = None) -> Decision:
    return decide(what, Observed(child, pods, progress), NOW, SETTINGS)


# --- starting --------------------------------------------------------------------------------------------------------


def test_a_new_job_is_created_as_attempt_one() -> None:
    assert look(job()).action == Create(1)


def test_a_gang_runs_only_when_all_of_its_pods_do() -> None:
    decision = look(job(nodes=2), workload(nodes=2), pod(0), pod(1, state="pending"))
    assert (decision.status.phase, decision.status.reason) == (Phase.STARTING, "PodsStarting")
    decision = look(job(nodes=2), workload(nodes=2), pod(0), pod(1))
    assert decision.status.phase is Phase.RUNNING


def test_a_pod_that_was_just_placed_is_not_yet_worth_a_status_write() -> None:
    def scheduled(age: float) -> str:
        status = look(job(), workload(), pod(state="pending", age=age)).status
        return next(item.status for item in status.conditions if item.type is ConditionType.SCHEDULED)

    assert (scheduled(1), scheduled(6)) == ("False", "True")


def test_a_pod_of_another_owner_or_attempt_does_not_speak_for_the_job() -> None:
    foreign = pod(code=65, state="ended")
    foreign["metadata"]["ownerReferences"][0]["uid"] = "job-0"
    decision = look(running(), workload(), foreign, pod(code=70, state="ended", attempt=7), pod())
    assert decision.status.phase is Phase.RUNNING
    assert decision.status.incident is None


def test_a_quota_that_forbids_the_pods_is_told_in_its_own_words() -> None:
    text = 'Error creating: pods "tune-0-x" is forbidden: exceeded quota: gpus'
    decision = decide(job(), Observed(workload(), refusal=text), NOW, SETTINGS)
    assert (decision.status.phase, decision.status.reason) == (Phase.STARTING, "PodsRefused")
    assert text in (decision.status.message or "")
    assert decision.requeue_after is not None


# --- ending ----------------------------------------------------------------------------------------------------------


def test_a_trainer_that_ended_well_is_still_running_until_its_job_is_complete() -> None:
    decision = look(running(), workload(), pod(state="ending", code=0))
    assert decision.status.phase is Phase.RUNNING


def test_a_failed_container_is_judged_when_the_kubelet_has_said_all() -> None:
    assert look(running(), workload(), pod(state="ending", code=70, age=1)).status.incident is None
    assert look(running(), workload(), pod(state="ending", code=70, age=1)).requeue_after == 5.0
    assert look(running(), workload(), pod(state="ended", code=70, age=1)).status.incident is not None


def test_a_sidecar_that_never_ends_does_not_hide_the_trainers_failure() -> None:
    decision = look(running(), workload(), pod(state="ending", code=70, age=6))
    assert decision.status.incident is not None


def test_success_waits_for_the_last_pod() -> None:
    complete = workload(conditions=[{"type": "Complete", "status": "True"}])
    assert look(running(), complete, pod(state="ended"), pod(1)).status.phase is Phase.RUNNING
    assert look(running(), complete, pod(state="ended")).status.phase is Phase.SUCCEEDED


def test_a_finished_job_beats_a_suspension_that_came_too_late() -> None:
    complete = workload(suspended=True, conditions=[{"type": "Complete", "status": "True"}])
    assert look(running(suspend=True), complete).status.phase is Phase.SUCCEEDED


def test_a_failed_job_whose_pods_are_gone_is_explained_by_the_jobs_own_words() -> None:
    text = "Container trainer for pod ml/tune-0-x failed with exit code 65 matching FailJob rule at index 1"
    failed = workload(conditions=[{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": text}])
    status = look(running(), failed).status
    assert (status.phase, status.reason) == (Phase.FAILED, "Data")
    assert text in (status.message or "")


def test_a_job_that_ended_is_left_as_it_is() -> None:
    ended = job(phase=Phase.FAILED, reason="Data", attempt=1, workload="job-1")
    decision = look(ended)
    assert (decision.status, decision.action) == (ended.status, None)


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    doomed = running()
    doomed.metadata.deletion_timestamp = timestamp(NOW)
    assert look(doomed, workload(), pod(code=65, state="ended")) == Decision(doomed.status)


# --- incidents -------------------------------------------------------------------------------------------------------


def test_an_incident_is_written_before_anything_is_touched() -> None:
    decision = look(running(nodes=2), workload(nodes=2), pod(0), pod(1, code=69, state="ended"))
    assert decision.action is None
    found = decision.status.incident
    assert found is not None
    assert (found.cause, found.retry, found.attempt) == ("Infrastructure", True, 1)
    assert found.pod_uids == ["pod-0-1", "pod-1-1"]
    assert decision.status.restarts.infrastructure == decision.status.restarts.total == 1


def test_an_incident_is_counted_once_however_many_pods_it_took_down() -> None:
    first = look(running(nodes=2), workload(nodes=2), pod(0, code=69, state="ended"), pod(1))
    again = look(running(nodes=2, **first.status.model_dump(include={"restarts"}), incident=first.status.incident),
                 workload(nodes=2), pod(0, code=69, state="ended"), pod(1, code=69, state="ended"))  # fmt: skip
    assert again.action == Suspend()
    assert again.status.restarts.total == 1


def test_a_suspended_job_whose_controller_has_not_looked_yet_is_not_resumed() -> None:
    sleeping = workload(suspended=True)
    sleeping["status"]["conditions"] = []
    decision = look(running(incident=incident()), sleeping)
    assert (decision.action, decision.status.phase) == (None, Phase.RESTARTING)


def test_a_job_at_rest_is_resumed_under_the_next_attempts_number() -> None:
    assert look(running(incident=incident()), workload(suspended=True)).action == Resume(2, 1)


def test_a_start_time_that_older_clusters_keep_is_removed_before_the_template_is_changed() -> None:
    sleeping = workload(suspended=True, startTime="2026-01-01T11:00:00Z")
    assert look(running(incident=incident()), sleeping).action == ForgetStart()


def test_a_resumed_job_says_itself_which_attempt_it_is_in() -> None:
    """As after a crash between the patch of the Job and the write of the status."""
    decision = look(running(incident=incident()), workload(attempt=2), pod(attempt=2))
    status = decision.status
    assert (status.phase, status.attempt, status.incident) == (Phase.RUNNING, 2, None)


def test_a_suspension_by_the_user_holds_back_the_restart() -> None:
    status = look(running(suspend=True, incident=incident()), workload(suspended=True)).status
    assert (status.phase, status.reason) == (Phase.SUSPENDED, "Suspended")
    assert "S3 is away" in (status.message or "")
    assert status.incident is not None


@pytest.mark.parametrize(("budget", "retry"), [(0, False), (1, True)])
def test_an_error_of_the_program_is_retried_only_where_it_was_asked_for(budget: int, retry: bool) -> None:
    decision = look(running(retries={"application": budget}), workload(), pod(code=70, state="ended"))
    assert decision.status.incident is not None
    assert decision.status.incident.retry is retry
    assert decision.status.restarts.application == int(retry)


def test_a_budget_that_is_raised_while_it_runs_counts() -> None:
    used = {"infrastructure": 3, "total": 3}
    spent = look(running(retries={"infrastructure": 3}, restarts=used), workload(), pod(code=69, state="ended"))
    raised = look(running(retries={"infrastructure": 4}, restarts=used), workload(), pod(code=69, state="ended"))
    assert [item.status.incident and item.status.incident.retry for item in (spent, raised)] == [False, True]


def test_disruptions_are_free_for_ever() -> None:
    decision = look(running(restarts={"disruption": 500, "total": 500}), workload(), pod(code=75, state="ended"))
    assert decision.status.incident is not None
    assert decision.status.incident.retry


def test_a_failure_that_is_not_retried_keeps_its_phase_until_nothing_runs_any_more() -> None:
    decision = look(running(nodes=2, incident=incident(retry=False)), workload(nodes=2, suspended=True), pod(1))
    assert (decision.status.phase, decision.status.reason) == (Phase.RUNNING, "Infrastructure")
    over = look(running(nodes=2, incident=incident(retry=False)), workload(nodes=2, suspended=True))
    assert over.status.phase is Phase.FAILED
    assert over.events[0].warning


# --- pods that are held ----------------------------------------------------------------------------------------------

TERMINATED = (
    'configmaps "tune-job" is forbidden: unable to create new content in namespace ml because it is being terminated'
)


def held(seconds: float) -> Object:
    """A failed pod that was deleted so long ago and that the Job controller keeps."""
    kept = pod(code=75, state="ended")
    kept["metadata"]["deletionTimestamp"] = timestamp(NOW - timedelta(seconds=seconds))
    kept["metadata"]["finalizers"] = ["batch.kubernetes.io/job-tracking"]
    return kept


def test_a_job_whose_namespace_is_deleted_lets_go_of_its_pods_or_the_namespace_would_stay_for_ever() -> None:
    seen = Observed(workload(suspended=True), (held(5),))
    assert refused(running(), seen, NOW, SETTINGS, message=TERMINATED, final=False).action == Delete()


@pytest.mark.parametrize("phase", [Phase.SUSPENDED, Phase.FAILED])
def test_a_sleeping_job_lets_go_of_a_failed_pod_that_somebody_deleted(phase: Phase) -> None:
    what = running(phase=phase, suspend=True)
    assert look(what, workload(suspended=True), held(31)).action == Delete()
    early = look(what, workload(suspended=True), held(5))
    assert (early.action, early.requeue_after) == (None, 30.0)


def test_a_pod_that_waits_for_its_replacement_is_no_reason_to_delete_the_job() -> None:
    assert look(running(attempt=2), workload(attempt=2), held(600)).action is None
    assert look(running(attempt=2), workload(attempt=2), held(661)).action == Delete()


# --- conditions, time, words -----------------------------------------------------------------------------------------


def test_a_transition_time_moves_only_when_the_status_flips() -> None:
    first = look(job(), workload(), pod(state="pending")).status
    later = job(**{name: getattr(first, name) for name in FineTuneJobStatus.model_fields})
    second = decide(later, Observed(workload(), (pod(),)), NOW + timedelta(minutes=5), SETTINGS).status
    times = {item.type: item.last_transition_time for item in second.conditions}
    assert times[ConditionType.VALID] == "2026-01-01T12:00:00Z"
    assert times[ConditionType.RUNNING] == "2026-01-01T12:05:00Z"
    assert {item.observed_generation for item in second.conditions} == {3}


def test_what_stands_still_has_no_time_left_and_no_speed() -> None:
    progress = progress_status(Progress(step=3, total_steps=9, eta_seconds=60, tokens_per_second=5.5), timestamp(NOW))
    stopped = look(running(suspend=True, progress=progress), workload(suspended=True)).status.progress
    assert stopped is not None
    assert (stopped.steps, stopped.eta, stopped.tokens_per_second) == ("3/9", None, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, None), (0, "0s"), (45, "45s"), (750, "12m30s"), (4980, "1h23m"), (183600, "2d3h"), (-5, "0s")],
)
def test_durations_have_two_units(seconds: int | None, text: str | None) -> None:
    assert duration(seconds) == text


def test_a_stage_is_told_with_its_detail_and_the_newest_warning() -> None:
    progress = Progress(stage=Stage.DOWNLOADING, detail="3/8 files, 1.2 GiB", warnings=["old", "rows were cut"])
    words = "Downloading model and data: 3/8 files, 1.2 GiB"
    assert progress_sentence(progress) == f"{words} (2 warnings, the last: rows were cut)"
    assert progress_sentence(progress.model_copy(update={"warnings": ["old"]})) == f"{words} (warning: old)"


def test_numbers_that_are_no_numbers_do_not_break_the_status() -> None:
    status = progress_status(Progress(loss=float("nan"), grad_norm=float("inf"), total_steps=0), timestamp(NOW))
    assert (status.loss, status.percent) == ("nan", None)
