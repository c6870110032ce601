"""Jobs in a queue of Kueue's: it alone says when the Job runs, and it may suspend it again at any time.

The operator never resumes such a Job. It suspends it once to start a gang anew, and Kueue resumes it as soon as it is
numbered, without waiting for the old pods, which are deleted one by one. Each index is replaced only when its old pod
has ended, and an agent that meets another attempt leaves: incarnations still never mix.

A Job that Kueue takes back gets the pod template that it had when Kueue first saw it, also the number in that: it is
numbered again until Kueue keeps it.
"""

from __future__ import annotations

from finetune_api.contract import Cause
from finetune_api.status import Incident, Phase
from finetune_operator.cluster.port import Object
from finetune_operator.failures import Failure
from finetune_operator.lifecycle.conditions import was_resumed, was_taken_back
from finetune_operator.lifecycle.deadlines import past_deadline
from finetune_operator.lifecycle.decision import (
    TEARDOWN_SECONDS,
    Decision,
    Delete,
    Free,
    Remove,
    Situation,
    Suspend,
)
from finetune_operator.lifecycle.incidents import await_rest, open_incident
from finetune_operator.lifecycle.start import number, start_next, still_there, suspending
from finetune_operator.observed import (
    attempt_of,
    controller_uid,
    current_pods,
    is_at_rest,
    is_deleting,
    is_done,
    is_suspended,
    live_pods,
    lost_pods,
    rests_for,
    succeeded,
    uid,
    workload_attempt,
)

REASON_SECONDS = 2.0
"""How long Kueue gets to say why it has taken a Job back: it does so when all else is done."""


def in_queue(situation: Situation) -> Decision | None:
    """What is done about a Job that waits in a queue, or was put back into it; None where it may run."""
    workload = situation.observed.workload
    if not situation.is_queued or workload is None:
        return None
    return _asleep(situation, workload) if is_suspended(workload) else _awake(situation, workload)


def _asleep(situation: Situation, workload: Object) -> Decision:
    queue = situation.queue
    if was_taken_back(situation.status, situation.observed):
        if situation.observed.eviction is None and rests_for(workload, situation.now) < REASON_SECONDS:
            return Decision(situation.status, requeue_after=REASON_SECONDS)
        why = situation.observed.eviction or "Kueue gave no reason"
        return open_incident(situation, Failure(Cause.DISRUPTION, f"Queue {queue} took the job back: {why}"))
    if _is_undone(situation, workload) and is_at_rest(workload):
        return number(situation, workload, situation.status.attempt)
    text = f"Waiting in queue {queue}"
    return Decision(situation.to(Phase.QUEUED, "Queued", text))


def _awake(situation: Situation, workload: Object) -> Decision | None:
    if _is_undone(situation, workload):
        return Decision(situation.status, Suspend())
    return _run_anew(situation, workload) or _clear(situation, workload)


def _is_undone(situation: Situation, workload: Object) -> bool:
    """Whether Kueue has given the Job an old number back."""
    return workload_attempt(workload) < situation.status.attempt


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
    # Before that its template is fixed.
    return start_next(situation) if is_at_rest(workload) else await_rest(situation, incident)


def leave_queue(situation: Situation) -> Decision | None:
    """A user's suspension gives the place in the queue back; None where there is none.

    A Job that should have a queue and has none goes as well: Kueue gives one to new Jobs only.
    """
    waits = situation.is_queued or was_resumed(situation.status)
    if not waits or situation.observed.workload is None:
        return None
    if situation.status.workload is not None:
        # Written before it is done: a crash in between must not make a loss of it.
        return Decision(suspending(situation), requeue_after=0.0)
    return Decision(situation.status, Delete())


def _run_anew(situation: Situation, workload: Object) -> Decision | None:
    """Start a gang again that lacks an index: what has ended well is never run again, and here it was an old pod."""
    if succeeded(workload) <= sum(map(is_done, current_pods(situation.observed))):
        return None
    text = "A pod of an earlier attempt ended well after this one was numbered, and its index is not run again"
    return open_incident(situation, Failure(Cause.DISRUPTION, text))


def _clear(situation: Situation, workload: Object) -> Decision | None:
    """Delete pods of earlier attempts that the Job controller has left alive, and wait for them."""
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
