"""Pods of a Job that may run -> Starting or Running, with what they wait for or how far they are."""

from __future__ import annotations

from finetune_api.contract import Progress
from finetune_api.status import CheckpointStatus, Phase, ProgressStatus
from finetune_operator.failures import obstacle
from finetune_operator.lifecycle.decision import PODS_REFUSED, REFUSED_SECONDS, Decision, Situation
from finetune_operator.lifecycle.silence import NO_ANSWER, TEXT, is_silent
from finetune_operator.lifecycle.text import count, numbers, progress_sentence, progress_status
from finetune_operator.observed import (
    SETTLE_SECONDS,
    current_pods,
    is_done,
    is_running,
    parse_time,
    pods_overdue_in,
    starts_late_in,
)


def follow(situation: Situation) -> Decision:
    """Starting until every pod runs, then Running."""
    pods = current_pods(situation.observed)
    running = sum(map(is_running, pods))
    if running + sum(map(is_done, pods)) >= situation.nodes:
        return _running(situation)
    held_up = obstacle(pods)
    if held_up is not None:
        return Decision(situation.to(Phase.STARTING, held_up.reason, held_up.message))
    trouble = situation.observed.trouble
    if trouble is not None:
        text = f"A pod has a node but cannot start: {trouble.message}"
        return Decision(situation.to(Phase.STARTING, trouble.reason, text), requeue_after=REFUSED_SECONDS)
    refusal = situation.observed.refusal
    if not pods and refusal is not None:
        text = f"The cluster refuses the pods: {refusal}"
        return Decision(situation.to(Phase.STARTING, PODS_REFUSED, text), requeue_after=REFUSED_SECONDS)
    # How many run already is not told: on a large gang each number would cost a status write.
    text = f"Waiting for {count(situation.nodes)} to be scheduled and started"
    return Decision(situation.to(Phase.STARTING, "PodsStarting", text), requeue_after=_late_in(situation))


def _late_in(situation: Situation) -> float | None:
    """Seconds until somebody has let pods wait for long: the Job controller, or a kubelet. No event tells of that; of
    all else one does, so that thousands of jobs that wait for nodes cost nothing."""
    overdue = pods_overdue_in(situation.observed, situation.now)
    if overdue is not None:
        return overdue or SETTLE_SECONDS
    return starts_late_in(situation.observed, situation.now)


def _running(situation: Situation) -> Decision:
    """Without a time to look again but for progress that is held back: the poller tells of what is new."""
    status, progress = situation.status, situation.observed.progress
    entered = status.phase is not Phase.RUNNING
    if is_silent(situation):
        return Decision(situation.to(Phase.RUNNING, NO_ANSWER, TEXT))
    if progress is None or progress.attempt != status.attempt:
        if not entered:
            return Decision(status)
        return Decision(situation.to(Phase.RUNNING, "Running", "The pods run; the trainer has not reported yet"))
    wait = 0.0 if entered else _due_in(situation, progress)
    if wait != 0.0:
        return Decision(status, requeue_after=wait)
    text = progress_sentence(progress)
    return Decision(situation.to(Phase.RUNNING, progress.stage.value, text, **_numbers(situation, progress)))


def _due_in(situation: Situation, progress: Progress) -> float | None:
    """Seconds until progress that has moved is written, since status writes are dear; None where it has not moved."""
    last = situation.status.progress
    if last is None or last.updated_at is None:
        return 0.0
    if progress_status(progress, last.updated_at) == last and not _news(situation, progress):
        return None
    age = (situation.now - parse_time(last.updated_at)).total_seconds()
    return max(0.0, situation.settings.progress_write_seconds - age)


def _news(situation: Situation, progress: Progress) -> bool:
    """Something beside the numbers has changed."""
    sentence_is_new = progress_sentence(progress) != situation.status.message
    return sentence_is_new or _checkpoint(progress) not in (None, situation.status.checkpoint)


def _numbers(situation: Situation, progress: Progress) -> dict[str, object]:
    newest: ProgressStatus = progress_status(progress, situation.time)
    return {
        "progress": newest,
        "metrics": {**situation.status.metrics, **numbers(progress.metrics)},
        "checkpoint": _checkpoint(progress) or situation.status.checkpoint,
    }


def _checkpoint(progress: Progress) -> CheckpointStatus | None:
    found = progress.checkpoint
    return CheckpointStatus(uri=found.uri, step=found.step, time=found.time) if found else None
