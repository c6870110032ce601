"""Starting the next attempt, only when nothing of an earlier one is left; and what is said while something is."""

from __future__ import annotations

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.cluster.port import Object
from finetune_operator.lifecycle.decision import Create, Decision, Delete, ForgetStart, Number, Resume, Situation
from finetune_operator.lifecycle.text import count
from finetune_operator.observed import Observed, has_completed_index, has_start_time, live_pods


def start_next(situation: Situation, nodes: int | None = None) -> Decision:
    """Create the Job or wake it, under the next attempt's number; everything is torn down.

    Args:
        nodes: pods of an elastic job that goes on with fewer; absent: all.
    """
    workload, attempt = situation.observed.workload, situation.status.attempt + 1
    if workload is None:
        return Decision(situation.status, Create(attempt))
    if has_completed_index(workload):
        # An index that has succeeded is never run again, and without it the gang would not come together.
        return Decision(situation.status, Delete())
    if situation.is_queued:
        return number(situation, workload, attempt)
    if has_start_time(workload):
        return Decision(situation.status, ForgetStart())
    return Decision(situation.status, Resume(attempt, nodes or situation.job.spec.resources.nodes))


def number(situation: Situation, workload: Object, attempt: int) -> Decision:
    """Number the pods of a Job that is at rest, for a queue that resumes it."""
    return Decision(situation.status, ForgetStart() if has_start_time(workload) else Number(attempt))


def still_there(observed: Observed) -> str:
    """What a teardown waits for."""
    live = live_pods(observed)
    return f"{count(len(live))} to save and stop" if live else "the Job to come to rest"


def suspending(situation: Situation) -> FineTuneJobStatus:
    """On the way to a user's suspension. The attempt is over, so its Job is missed no more, also where the user changes
    his mind before all is torn down."""
    text = f"Suspending: waiting for {still_there(situation.observed)}"
    return situation.to(situation.status.phase or Phase.STARTING, "Suspending", text, workload=None)
