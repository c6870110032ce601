"""Jobs in a queue of Kueue's: it alone says when the Job runs, and it may suspend it again at any time.

The operator never resumes such a Job. It suspends it once to start a gang anew; while Kueue has it admitted, Kueue
resumes it at once, maybe before the Job controller has seen that. So the attempt is numbered without waiting for the
old pods, which are deleted one by one. Each index is replaced only when its old pod has ended, and an agent that meets
another attempt leaves: incarnations still never mix.
"""

from __future__ import annotations

from finetune_api.contract import Cause
from finetune_api.status import ConditionType, FineTuneJobStatus, Incident, Phase
from finetune_operator.failures import Failure
from finetune_operator.lifecycle.deadlines import past_deadline
from finetune_operator.lifecycle.decision import TEARDOWN_SECONDS, Decision, Delete, Free, Remove, Situation, Suspend
from finetune_operator.lifecycle.incidents import open_incident
from finetune_operator.lifecycle.start import start_next, still_there, suspending
from finetune_operator.observed import (
    Observed,
    attempt_of,
    controller_uid,
    current_pods,
    is_deleting,
    is_suspended,
    live_pods,
    lost_pods,
    uid,
    workload_attempt,
)


def in_queue(situation: Situation) -> Decision | None:
    """What is done about a Job that waits in a queue, or was put back into it; None where it may run."""
    workload = situation.observed.workload
    if not situation.is_queued or workload is None:
        return None
    if not is_suspended(workload):
        return _clear(situation)
    queue = situation.queue
    if was_taken_back(situation.status, situation.observed):
        why = situation.observed.eviction or "Kueue gave no reason"
        return open_incident(situation, Failure(Cause.DISRUPTION, f"Queue {queue} took the job back: {why}"))
    text = f"Waiting in queue {queue}"
    return Decision(situation.to(Phase.QUEUED, "Queued", text))


def restart_in_queue(situation: Situation, incident: Incident) -> Decision | None:
    """The next step after an incident; None for a job without a queue."""
    workload = situation.observed.workload
    if not situation.is_queued or workload is None:
        return None
    if not incident.retry or situation.job.spec.suspend:
        # Kueue would resume a Job that is only suspended.
        return Decision(situation.status, Delete())
    if not is_suspended(workload):
        return Decision(situation.status, Suspend())
    return start_next(situation)


def leave_queue(situation: Situation) -> Decision | None:
    """A user's suspension gives the place in the queue back; None where there is none."""
    if not situation.is_queued or situation.observed.workload is None:
        return None
    if situation.status.workload is not None:
        # Written before it is done: a crash in between must not make a loss of it.
        return Decision(suspending(situation), requeue_after=0.0)
    return Decision(situation.status, Delete())


def was_taken_back(status: FineTuneJobStatus, observed: Observed) -> bool:
    """Whether a queue has suspended a Job that it had admitted.

    What ran ran, also where no status tells of it: two incarnations must never have one number.
    """
    if observed.workload is None or not is_suspended(observed.workload):
        return False
    admitted = any(item.type is ConditionType.ADMITTED and item.status == "True" for item in status.conditions)
    return admitted or bool(current_pods(observed))


def _clear(situation: Situation) -> Decision | None:
    """Delete pods of earlier attempts that the Job controller has left alive, and wait for them."""
    workload = situation.observed.workload
    assert workload is not None
    old = [
        pod
        for pod in live_pods(situation.observed)
        if controller_uid(pod) == uid(workload) and attempt_of(pod["metadata"]) < workload_attempt(workload)
    ]
    if left := tuple(pod for pod in old if not is_deleting(pod)):
        return Decision(situation.status, Remove(left))
    if lost := tuple(pod for pod in lost_pods(situation.observed, situation.now) if pod in old):
        # What takes their place is of another attempt, by which they are fenced off.
        return Decision(situation.status, Free(lost))
    if not old:
        return None
    text = f"Waiting for {still_there(situation.observed)}"
    waits = Decision(situation.to(Phase.RESTARTING, "WaitingForOldPods", text), requeue_after=TEARDOWN_SECONDS)
    return past_deadline(situation) or waits
