"""Pods that are held for ever.

Since Kubernetes 1.34 a namespace is deleted pods first. A Job controller that may not create pods there never replaces
the last failed pod of an index, and never lets go of it: the namespace would stay for ever, and with it the
FineTuneJob. The same happens to somebody who deletes a failed pod of a Job that sleeps.
"""

from __future__ import annotations

from finetune_api.status import TERMINAL, Phase
from finetune_operator.lifecycle.decision import Decision, Delete, Situation
from finetune_operator.observed import finished, held_for, held_pods, is_suspended

HELD_SECONDS = 30.0
"""How long the Job controller gets to let go by itself."""
REPLACED_SECONDS = 660.0
"""How long it may take to replace a pod: its longest back-off is 600 s."""


def let_go(situation: Situation) -> Decision | None:
    """Delete a Job that holds pods and does not replace them; a job that goes on makes itself a new one."""
    held = held_for(situation.observed, situation.now)
    patience = HELD_SECONDS if _sleeps(situation) else REPLACED_SECONDS
    workload = situation.observed.workload
    if workload is None or finished(workload) or held < patience:
        return None
    return Decision(situation.status, Delete())


def look_again(situation: Situation, requeue_after: float | None) -> float | None:
    """When to look next, with the time that the Job controller gets."""
    if requeue_after is None and held_pods(situation.observed):
        return HELD_SECONDS
    return requeue_after


def _sleeps(situation: Situation) -> bool:
    """Whether the Job is suspended for good, or until a person does something."""
    workload = situation.observed.workload
    if workload is None or not is_suspended(workload):
        return False
    return situation.status.phase in TERMINAL or (
        situation.status.phase is Phase.SUSPENDED and situation.job.spec.suspend
    )
