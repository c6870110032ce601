"""Pods that do not answer: whether they make progress is not known, and not knowing is no reason to end them."""

from __future__ import annotations

from finetune_api.contract import Progress
from finetune_api.status import Condition, ConditionType
from finetune_operator.lifecycle.decision import Situation

SILENT_SECONDS = 120.0
"""How long a pod may leave the operator without an answer before that is told: several tries, each of two seconds."""
NO_ANSWER = "Unreachable"
TEXT = (
    "The pod with index 0 runs but does not answer on its progress port, so it is not known whether it makes progress; "
    "its own agent still watches it. Check NetworkPolicies and the pod's log"
)


def answer(situation: Situation) -> Progress | None:
    """What the trainer of this attempt said last, if it still answers."""
    progress = situation.observed.progress
    if progress is None or progress.attempt != situation.status.attempt or is_silent(situation):
        return None
    return progress


def is_silent(situation: Situation) -> bool:
    """Whether it has not answered for long. What an operator before this one found out holds until there is news."""
    observed = situation.observed
    if observed.silence >= SILENT_SECONDS:
        return True
    return observed.progress is None and _was_silent(situation)


def _was_silent(situation: Situation) -> bool:
    known = stalled_condition(situation)
    return known is not None and known.status == "Unknown"


def stalled_condition(situation: Situation) -> Condition | None:
    """What was said of standstills so far."""
    conditions = situation.status.conditions
    return next((item for item in conditions if item.type is ConditionType.STALLED), None)
