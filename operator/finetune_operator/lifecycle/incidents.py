"""Incidents: counted once in status, then torn down, then restarted within the budget or failed.

The order is what makes a crash of the operator harmless at any point: the incident and its counter are written before
anything is touched, the Job's suspension is the barrier between two attempts, and the attempt number on the Job says
whether it was resumed.
"""

from __future__ import annotations

from finetune_api.contract import Cause
from finetune_api.status import Incident, Phase, Restarts
from finetune_operator.failures import Failure, Rank
from finetune_operator.lifecycle.decision import TEARDOWN_SECONDS, Decision, Delete, Notice, Situation, Suspend
from finetune_operator.lifecycle.ending import fail
from finetune_operator.lifecycle.start import start_next
from finetune_operator.lifecycle.text import with_log
from finetune_operator.observed import current_pods, is_suspended, torn_down, tracked_failures, uid

MAX_NODES = 64
"""The schema's bound of status.nodeFailures; the oldest are forgotten."""
COUNTERS = {
    Cause.DISRUPTION: "disruption",
    Cause.INFRASTRUCTURE: "infrastructure",
    Cause.APPLICATION: "application",
    Cause.OUT_OF_MEMORY: "out_of_memory",
    Cause.STALLED: "stalled",
}
"""Fields of Restarts by cause; a cause without one is never retried."""
ON_ACCOUNT_OF = {Cause.STALLED: Cause.INFRASTRUCTURE}
"""Causes that are counted on their own and held against another one's budget: most standstills are the fault of a
network, a disk or a GPU."""


def open_incident(situation: Situation, failure: Failure) -> Decision:
    """Record it; whether it is retried is decided here, once, with its counter."""
    retry = _affordable(situation, failure.cause)
    incident = Incident(
        cause=failure.cause.value,
        message=failure.message,
        advice=failure.advice,
        retry=retry,
        attempt=situation.status.attempt,
        started_at=situation.time,
        pod_uids=[uid(pod) for pod in current_pods(situation.observed)],
    )
    counted = _counted(situation.status.restarts, failure.cause) if retry else situation.status.restarts
    phase = Phase.RESTARTING if retry else situation.status.phase
    nodes = nodes_with(situation.status.node_failures, failure)
    changes = {"incident": incident, "restarts": counted, "node_failures": nodes}
    status = situation.to(phase, incident.cause, _stopping(incident), **changes)
    told = with_log(f"{incident.cause}: {failure.message}", failure.log)
    events = (Notice("Restarting", told, warning=True),) if retry else ()
    return Decision(status, events=events, requeue_after=0.0)


def nodes_with(known: dict[str, int], failure: Failure) -> dict[str, int]:
    """Failures by node, with this one where it speaks against its node: a lost peer or a bucket that is away does not,
    nor does what was taken away on purpose."""
    guilty = failure.cause in (Cause.INFRASTRUCTURE, Cause.STALLED) and failure.rank is not Rank.PEER
    if not guilty or not failure.node:
        return known
    others = {node: times for node, times in known.items() if node != failure.node}
    return dict([*others.items(), (failure.node, known.get(failure.node, 0) + 1)][-MAX_NODES:])


def handle_incident(situation: Situation, incident: Incident) -> Decision:
    """The next step after an incident was recorded."""
    workload = situation.observed.workload
    if workload is not None and not is_suspended(workload):
        return Decision(situation.status, Suspend())
    if not torn_down(situation.observed):
        return await_rest(situation, incident)
    if not incident.retry:
        return fail(situation, Cause(incident.cause), _last_word(situation, incident))
    if situation.job.spec.suspend:
        text = f"Suspended; the last attempt ended with {incident.cause}: {incident.message}"
        return Decision(situation.to(Phase.SUSPENDED, "Suspended", text))
    if _is_held_against_it(situation, incident):
        return Decision(situation.status, Delete())
    return start_next(situation)


def _is_held_against_it(situation: Situation, incident: Incident) -> bool:
    """Whether the Job controller would make the job wait for what was not its fault: with each pod that has failed,
    be it for a node's drain, the next one waits twice as long, up to ten minutes. A new Job knows nothing of that."""
    return incident.cause == Cause.DISRUPTION.value and bool(tracked_failures(situation.observed))


def await_rest(situation: Situation, incident: Incident) -> Decision:
    """What is said while pods of the attempt are being stopped."""
    phase = Phase.RESTARTING if incident.retry else situation.status.phase
    status = situation.to(phase, incident.cause, _stopping(incident))
    return Decision(status, requeue_after=TEARDOWN_SECONDS)


def _stopping(incident: Incident) -> str:
    """The same all through the teardown: how many pods are left is not worth a status write each."""
    return f"{incident.message}; stopping what still runs"


def _affordable(situation: Situation, cause: Cause) -> bool:
    if cause is Cause.DISRUPTION:
        return True
    return cause in COUNTERS and _used(situation, cause) < _budget(situation, cause)


def _payer(cause: Cause) -> Cause:
    return ON_ACCOUNT_OF.get(cause, cause)


def _used(situation: Situation, cause: Cause) -> int:
    """Of the budget that the cause is held against."""
    fields = [field for other, field in COUNTERS.items() if _payer(other) is _payer(cause)]
    return sum(int(getattr(situation.status.restarts, field)) for field in fields)


def _budget(situation: Situation, cause: Cause) -> int:
    return int(getattr(situation.job.spec.run_policy.retries, COUNTERS[_payer(cause)]))


def _counted(restarts: Restarts, cause: Cause) -> Restarts:
    field = COUNTERS[cause]
    return restarts.model_copy(update={"total": restarts.total + 1, field: getattr(restarts, field) + 1})


def _last_word(situation: Situation, incident: Incident) -> str:
    """Why it is over: what happened, what helps, and what was tried."""
    cause, parts = Cause(incident.cause), [incident.message]
    if incident.advice:
        parts.append(f"Advice: {incident.advice}")
    if cause in COUNTERS:
        used, word = _used(situation, cause), COUNTERS[_payer(cause)].replace("out_of_memory", "outOfMemory")
        parts.append(
            f"Attempt {incident.attempt}; {used} of runPolicy.retries.{word}={_budget(situation, cause)} were used"
        )
    return ". ".join(part.rstrip(".") for part in parts)
