"""The rules, in the order in which they apply: the first that has something to say decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from finetune_api.contract import Cause
from finetune_api.job import FineTuneJob
from finetune_api.status import TERMINAL, CheckpointStatus, FineTuneJobStatus, Phase
from finetune_operator.failures import Failure, classify, termination_message
from finetune_operator.lifecycle.chain import await_named
from finetune_operator.lifecycle.conditions import with_conditions
from finetune_operator.lifecycle.deadlines import expire, next_limit, past_deadline, time_to_live
from finetune_operator.lifecycle.decision import TEARDOWN_SECONDS, Action, Decision, Delete, Situation, Suspend
from finetune_operator.lifecycle.elastic import shrink, shrink_due
from finetune_operator.lifecycle.ending import finish
from finetune_operator.lifecycle.held import let_go, look_again
from finetune_operator.lifecycle.image import with_image
from finetune_operator.lifecycle.incidents import handle_incident, open_incident
from finetune_operator.lifecycle.leftovers import free_lost, tidy
from finetune_operator.lifecycle.outside import give_in
from finetune_operator.lifecycle.preflight import check_first, stop_preflight
from finetune_operator.lifecycle.queued import in_queue, leave_queue, restart_in_queue
from finetune_operator.lifecycle.running import follow
from finetune_operator.lifecycle.stalled import end_standstill
from finetune_operator.lifecycle.start import start_next, still_there, suspending
from finetune_operator.lifecycle.warnings import with_notices, with_warnings
from finetune_operator.observed import (
    SETTLE_SECONDS,
    Observed,
    current_pods,
    finished,
    is_settled,
    is_suspended,
    own_pods,
    timestamp,
    torn_down,
    uid,
    was_made_smaller,
    workload_attempt,
    workload_nodes,
)
from finetune_operator.settings import Settings

Rule = Callable[[Situation], Decision | None]


def decide(job: FineTuneJob, observed: Observed, now: datetime, settings: Settings) -> Decision:
    """What is true of a job now, and the one thing to do next."""
    if job.metadata.deletion_timestamp is not None:
        # Owner references collect the children; the status of what is going away interests nobody.
        return Decision(job.status)
    ended = job.status.phase in TERMINAL
    status = job.status if ended else _known(job.status, observed, now)
    situation = Situation(job, observed, now, settings, status)
    decision = next(found for rule in (RULES_AT_THE_END if ended else RULES) if (found := rule(situation)) is not None)
    if decision.action is not None:
        return decision
    limit = time_to_live(situation) if ended else next_limit(situation, decision.status)
    requeue_after = _soonest(look_again(situation, decision.requeue_after), limit, shrink_due(situation))
    told = decision.status if ended else with_conditions(situation, decision.status, decision.valid)
    return with_notices(replace(decision, status=told, requeue_after=requeue_after), job.status)


def _soonest(*moments: float | None) -> float | None:
    return min((seconds for seconds in moments if seconds is not None), default=None)


def _stay_ended(situation: Situation) -> Decision:
    """Terminal means terminal: a Job that somebody resumes after the end is put to sleep again."""
    workload = situation.observed.workload
    awake = workload is not None and not is_suspended(workload) and not finished(workload)
    asleep: Action = Delete() if situation.is_queued else Suspend()
    return Decision(situation.status, asleep if awake else None)


def _known(status: FineTuneJobStatus, observed: Observed, now: datetime) -> FineTuneJobStatus:
    """The status with what the children know better or later."""
    known = _adopt(status, observed, now)
    for learn in (_heard, with_image, with_warnings):
        known = learn(known, observed)
    return known


def _adopt(status: FineTuneJobStatus, observed: Observed, now: datetime) -> FineTuneJobStatus:
    """What the Job itself knows better than the status, since it was changed first: its uid and attempt."""
    workload = observed.workload
    if workload is None or (status.attempt > 0 and workload_attempt(workload) <= status.attempt):
        return status
    start = status.start_time or timestamp(now)
    update = {"workload": uid(workload), "attempt": workload_attempt(workload), "start_time": start, "incident": None}
    return status.model_copy(update={**update, "nodes": workload_nodes(workload)})


def _heard(status: FineTuneJobStatus, observed: Observed) -> FineTuneJobStatus:
    """A pod's last word knows of a later checkpoint than its last progress did: the one that SIGTERM made it save."""
    words = (termination_message(pod) for pod in own_pods(observed))
    saved = [word.checkpoint for word in words if word is not None and word.checkpoint is not None]
    newest = max(saved, key=lambda checkpoint: checkpoint.step, default=None)
    if newest is None or (status.checkpoint is not None and newest.step <= status.checkpoint.step):
        return status
    return status.model_copy(update={"checkpoint": CheckpointStatus(**newest.model_dump(by_alias=False))})


def _in_incident(situation: Situation) -> Decision | None:
    incident = situation.status.incident
    if incident is None:
        return None
    if incident.retry and not situation.job.spec.suspend and (over := past_deadline(situation)) is not None:
        return over
    return restart_in_queue(situation, incident) or handle_incident(situation, incident)


def _suspended_by_user(situation: Situation) -> Decision | None:
    if not situation.job.spec.suspend:
        return None
    workload = situation.observed.workload
    if (left := leave_queue(situation)) is not None:
        return left
    if workload is not None and not is_suspended(workload):
        return Decision(situation.status, Suspend())
    if not torn_down(situation.observed):
        return Decision(suspending(situation), requeue_after=TEARDOWN_SECONDS)
    checkpoint = situation.status.checkpoint
    # A pod may be gone before its last word was read, and with it the news of what it saved at the end.
    point = f"its newest checkpoint, of step {checkpoint.step} or later," if checkpoint else "its newest checkpoint"
    text = f"Suspended; it goes on from {point} when spec.suspend is false" if situation.status.attempt else "Suspended"
    return Decision(situation.to(Phase.SUSPENDED, "Suspended", text, workload=None))


def _workload_lost(situation: Situation) -> Decision | None:
    """Somebody deleted the Job of a running attempt, or deleted and re-created it by hand."""
    status, workload = situation.status, situation.observed.workload
    if status.workload is None or (workload is not None and uid(workload) == status.workload):
        return None
    return open_incident(situation, Failure(Cause.DISRUPTION, "The job's Indexed Job was deleted from outside"))


def _not_started(situation: Situation) -> Decision | None:
    """No Job, or one that sleeps: start the next attempt as soon as nothing of an earlier one is alive."""
    workload = situation.observed.workload
    if workload is not None and not is_suspended(workload):
        return None
    if not torn_down(situation.observed):
        text = f"An earlier run has not ended: waiting for {still_there(situation.observed)}"
        waits = Decision(situation.to(Phase.STARTING, "WaitingForOldPods", text), requeue_after=TEARDOWN_SECONDS)
        return past_deadline(situation) or waits
    if (given_in := give_in(situation)) is not None:
        return given_in
    keeps = workload is not None and was_made_smaller(workload) and situation.status.phase is not Phase.SUSPENDED
    return start_next(situation, situation.nodes if keeps else None)


def _failing(situation: Situation) -> Decision | None:
    pods = current_pods(situation.observed)
    failure = classify(pods)
    if failure is None:
        return None
    if not all(is_settled(pod, situation.now) for pod in pods):
        return Decision(situation.status, requeue_after=SETTLE_SECONDS)
    return open_incident(situation, failure)


RULES: tuple[Rule, ...] = (
    free_lost,
    finish,
    let_go,
    _in_incident,
    stop_preflight,
    _suspended_by_user,
    _workload_lost,
    await_named,
    check_first,
    in_queue,
    _not_started,
    _failing,
    past_deadline,
    end_standstill,
    tidy,
    shrink,
    follow,
)
RULES_AT_THE_END: tuple[Rule, ...] = (let_go, expire, _stay_ended)
