"""Conditions of a job, derived from its phase; lastTransitionTime moves only when a status flips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api.contract import Cause
from finetune_api.status import TERMINAL, Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator.lifecycle.decision import Situation
from finetune_operator.lifecycle.silence import NO_ANSWER, TEXT, is_silent
from finetune_operator.observed import (
    SETTLE_SECONDS,
    Observed,
    attempt_of,
    current_pods,
    is_deleting,
    is_live,
    is_suspended,
    own_pods,
    placed_since,
    workload_attempt,
)

Value = Literal["True", "False", "Unknown"]
OF_PHASE = {
    ConditionType.RUNNING: Phase.RUNNING,
    ConditionType.SUSPENDED: Phase.SUSPENDED,
    ConditionType.COMPLETE: Phase.SUCCEEDED,
    ConditionType.FAILED: Phase.FAILED,
}

PASSED, INCONCLUSIVE = "PreflightPassed", "PreflightInconclusive"
VERDICTS = (PASSED, INCONCLUSIVE)
"""Reasons of Valid after which a job is not checked again."""
RESUMED, NO_QUEUE = "ResumedOnce", "NoQueue"
"""Reasons of Admitted where a job has no queue: somebody else has suspended its Job, for the first time or again."""
WITH_PODS = (Phase.STARTING, Phase.RUNNING, Phase.SUCCEEDED, Phase.FAILED)


@dataclass(frozen=True)
class Stamp:
    """What every condition carries: the generation it speaks of, and the present as RFC 3339."""

    generation: int
    time: str


def with_conditions(situation: Situation, status: FineTuneJobStatus, valid: bool = True) -> FineTuneJobStatus:
    """The status with its conditions and the generation that it speaks of."""
    stamp = Stamp(situation.job.metadata.generation, situation.time)
    new = [_valid(stamp, status, valid), _scheduled(stamp, situation, status), *_phases(stamp, status)]
    new.append(_stalled(stamp, situation, status))
    if situation.is_queued and status.phase not in TERMINAL:
        new.append(_admitted(stamp, situation, status))
    elif status.reason in (RESUMED, NO_QUEUE):
        new.append(_make(stamp, ConditionType.ADMITTED, "False", status.reason, status.message or ""))
    elif was_resumed(status) and status.phase is Phase.RUNNING:
        new.append(_make(stamp, ConditionType.ADMITTED, "True", "Admitted"))
    return _merged(stamp, status, new)


def with_invalid(stamp: Stamp, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The status with Valid turned false, and nothing else said: all else is unknown."""
    return _merged(stamp, status, [_valid(stamp, status, False)])


def _merged(stamp: Stamp, status: FineTuneJobStatus, new: list[Condition]) -> FineTuneJobStatus:
    known = {item.type: item for item in status.conditions}
    merged = {**known, **{item.type: _settled(known.get(item.type), item) for item in new}}
    return status.model_copy(update={"conditions": list(merged.values()), "observed_generation": stamp.generation})


def _settled(old: Condition | None, new: Condition) -> Condition:
    if old is None or old.status != new.status:
        return new
    return new.model_copy(update={"last_transition_time": old.last_transition_time})


def _make(stamp: Stamp, kind: ConditionType, value: Value, reason: str | None, message: str = "") -> Condition:
    return Condition(
        type=kind,
        status=value,
        reason=reason or "Unknown",
        message=message,
        last_transition_time=stamp.time,
        observed_generation=stamp.generation,
    )


def _valid(stamp: Stamp, status: FineTuneJobStatus, valid: bool) -> Condition:
    if valid and status.reason in VERDICTS:
        return _make(stamp, ConditionType.VALID, "True", status.reason, status.message or "")
    if valid:
        # What preflight has found stays true.
        checked = verdict(status)
        reason, message = (checked.reason, checked.message) if checked else ("Accepted", "")
        return _make(stamp, ConditionType.VALID, "True", reason, message)
    return _make(stamp, ConditionType.VALID, "False", status.reason, status.message or "")


def verdict(status: FineTuneJobStatus) -> Condition | None:
    """What preflight has found; None before it has."""
    valid = (item for item in status.conditions if item.type is ConditionType.VALID and item.status == "True")
    return next((item for item in valid if item.reason in VERDICTS), None)


def was_resumed(status: FineTuneJobStatus) -> bool:
    """Whether a Job without a queue was resumed after somebody else had suspended it, and has not run since."""
    said = (item for item in status.conditions if item.type is ConditionType.ADMITTED and item.status == "False")
    return any(item.reason in (RESUMED, NO_QUEUE) for item in said)


def _admitted(stamp: Stamp, situation: Situation, status: FineTuneJobStatus) -> Condition:
    workload = situation.observed.workload
    lets_it_run = workload is not None and not is_suspended(workload) and workload_attempt(workload) >= status.attempt
    # What was taken back is told by its incident, and told once.
    if status.incident is None and (lets_it_run or was_taken_back(status, situation.observed)):
        return _make(stamp, ConditionType.ADMITTED, "True", "Admitted")
    return _make(stamp, ConditionType.ADMITTED, "False", _word(status), status.message or "")


def was_taken_back(status: FineTuneJobStatus, observed: Observed) -> bool:
    """Whether a queue has suspended a Job that it had admitted.

    What ran ran, also where no status tells of it: two incarnations must never have one number.
    """
    if observed.workload is None or not is_suspended(observed.workload):
        return False
    admitted = any(item.type is ConditionType.ADMITTED and item.status == "True" for item in status.conditions)
    attempt = max(status.attempt, workload_attempt(observed.workload))
    # Pods that live on may be those of a Job that was resumed between the look at it and the look at them.
    ran = (pod for pod in own_pods(observed) if is_deleting(pod) or not is_live(pod))
    return admitted or any(attempt_of(pod["metadata"]) == attempt for pod in ran)


def _scheduled(stamp: Stamp, situation: Situation, status: FineTuneJobStatus) -> Condition:
    if status.phase in WITH_PODS and _all_placed(situation, status):
        return _make(stamp, ConditionType.SCHEDULED, "True", "AllPodsScheduled")
    why = status.message or "" if status.reason in ("Unschedulable", "SchedulingGated") else ""
    return _make(stamp, ConditionType.SCHEDULED, "False", status.reason if why else str(_word(status)), why)


def _all_placed(situation: Situation, status: FineTuneJobStatus) -> bool:
    """A pod that was placed usually runs a moment later: one write tells both, unless its image takes long."""
    ages = [placed_since(pod, situation.now) for pod in current_pods(situation.observed)]
    placed = [age for age in ages if age is not None and (status.phase is not Phase.STARTING or age >= SETTLE_SECONDS)]
    return len(placed) >= situation.nodes


def _stalled(stamp: Stamp, situation: Situation, status: FineTuneJobStatus) -> Condition:
    """True from the standstill until the next attempt; for good where that was the end."""
    incident = status.incident
    if incident is not None and incident.cause == Cause.STALLED.value:
        return _make(stamp, ConditionType.STALLED, "True", "NoProgress", incident.message)
    if status.phase is Phase.RUNNING and is_silent(situation):
        return _make(stamp, ConditionType.STALLED, "Unknown", NO_ANSWER, TEXT)
    return _make(stamp, ConditionType.STALLED, "False", _word(status))


def _phases(stamp: Stamp, status: FineTuneJobStatus) -> list[Condition]:
    return [
        _make(stamp, kind, "True", status.reason, _told(kind, status))
        if status.phase is phase
        else _make(stamp, kind, "False", _word(status))
        for kind, phase in OF_PHASE.items()
    ]


def _told(kind: ConditionType, status: FineTuneJobStatus) -> str:
    """Running's sentence changes with every step: it stands in status.message alone."""
    return "" if kind is ConditionType.RUNNING else status.message or ""


def _word(status: FineTuneJobStatus) -> str | None:
    return status.phase.value if status.phase else None
