"""Pods that nobody else clears away: those of dead nodes, and the failed ones of earlier attempts."""

from __future__ import annotations

from finetune_operator.lifecycle.decision import Decision, Free, Remove, Situation
from finetune_operator.observed import (
    attempt_of,
    controller_uid,
    is_deleting,
    is_live,
    is_tracked,
    lost_pods,
    replaces_nothing,
    uid,
)


def free_lost(situation: Situation) -> Decision | None:
    """Free pods of dead nodes once nothing would replace them: a partitioned node may still run its pod, and two pods
    of one index must not be alive at a time. What such a pod still writes is fenced by the attempt in its manifests."""
    lost = lost_pods(situation.observed, situation.now)
    if not lost or not replaces_nothing(situation.observed.workload):
        return None
    return Decision(situation.status, Free(lost))


def tidy(situation: Situation) -> Decision | None:
    """Delete failed pods of earlier attempts when the Job controller has let go of them."""
    workload = situation.observed.workload
    owner = uid(workload) if workload else ""
    old = tuple(
        pod
        for pod in situation.observed.pods
        if controller_uid(pod) == owner and attempt_of(pod["metadata"]) < situation.status.attempt
        if not is_live(pod) and not is_deleting(pod) and not is_tracked(pod)
    )
    return Decision(situation.status, Remove(old)) if old else None
