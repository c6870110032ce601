"""Jobs without a queue that somebody else suspends.

A person may have done so by mistake, so the Job is resumed. Where that is undone it stays as it is: Kueue suspends
every Job that has no queue where it is told to manage them all, and would do so for ever.
"""

from __future__ import annotations

from finetune_api.status import Phase
from finetune_operator.lifecycle.conditions import NO_QUEUE, RESUMED, was_resumed
from finetune_operator.lifecycle.decision import Decision, Notice, Situation
from finetune_operator.observed import is_suspended, uid, was_made_smaller

ONCE = "Somebody has suspended this job's Job from outside; it is resumed once"
GIVEN_UP = (
    "The job's Job was resumed and suspended again from outside, as Kueue does where it manages Jobs without a queue. "
    "Apply the job anew with a LocalQueue in spec.scheduling.queue; or have a LocalQueue called default made in this "
    "namespace, then set spec.suspend to true and to false again"
)


def give_in(situation: Situation) -> Decision | None:
    """Say that the Job is resumed before it is, and that it was in vain after it was; None where nobody interferes."""
    status = situation.status
    if not _is_held_from_outside(situation) or status.reason == RESUMED:
        return None
    if was_resumed(status):
        given_up = situation.to(Phase.QUEUED, NO_QUEUE, GIVEN_UP)
        return Decision(given_up, events=(Notice(NO_QUEUE, GIVEN_UP, warning=True),))
    return Decision(situation.to(Phase.STARTING, RESUMED, ONCE), requeue_after=0.0)


def _is_held_from_outside(situation: Situation) -> bool:
    """Whether the Job of an attempt that goes on is suspended, and nobody here has done it."""
    workload = situation.observed.workload
    if workload is None or situation.is_queued or not is_suspended(workload) or was_made_smaller(workload):
        return False
    return situation.status.workload == uid(workload)
