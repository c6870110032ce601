"""Checked before it starts: what a small pod without a GPU finds becomes the condition Valid.

Nothing of it is counted as an attempt. What it has found is written into status before anything else is created, so
that no restart of the operator checks a job twice, and a job that was suspended meanwhile is checked anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.contract import CAUSE_OF_EXIT_CODE, MAX_WARNING, MAX_WARNINGS, Cause, ExitCode, TerminationMessage
from finetune_api.job import FineTuneJobSpec
from finetune_api.status import TERMINAL, FineTuneJobStatus, Phase
from finetune_operator.failures import Failure, classify_pod, obstacle, termination_message
from finetune_operator.lifecycle.conditions import INCONCLUSIVE, PASSED, verdict
from finetune_operator.lifecycle.decision import (
    PODS_REFUSED,
    REFUSED_SECONDS,
    CreatePreflight,
    Decision,
    DeletePreflight,
    Notice,
    Situation,
)
from finetune_operator.lifecycle.ending import fail
from finetune_operator.lifecycle.text import duration
from finetune_operator.observed import completed, failed, finished, is_suspended, queue_of
from finetune_operator.plan.preflight import LIMIT_SECONDS, is_wanted

DECISIVE = (ExitCode.USAGE, ExitCode.DATA, ExitCode.NOPERM, ExitCode.UNAVAILABLE)
"""What the check says of the job, and what ends it; any other end of its pod says nothing about the job."""
TOO_LONG = "DeadlineExceeded"
"""How the Job controller words that a Job has reached its activeDeadlineSeconds."""


def is_due(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> bool:
    """Whether the job is still to be checked: it has never started, and no check has been finished."""
    unstarted = status.attempt == 0 and status.phase not in TERMINAL
    return unstarted and is_wanted(spec) and verdict(status) is None


def check_first(situation: Situation) -> Decision | None:
    """Preflight until its Job has ended; then what it has found."""
    if not is_due(situation.job.spec, situation.status):
        return None
    child = situation.observed.preflight
    if child is None:
        return Decision(situation.status, CreatePreflight())
    if completed(child):
        return _passed(situation)
    if is_suspended(child) and queue_of(child) is None:
        # Kueue does so where it manages Jobs without a queue, and lets none of them run.
        return _inconclusive(situation, "somebody has suspended its Job")
    why = failed(child)
    return _judged(situation, why) if why is not None else _wait(situation)


def stop_preflight(situation: Situation) -> Decision | None:
    """A job that is suspended is not checked either."""
    child = situation.observed.preflight
    if not situation.job.spec.suspend or child is None or finished(child):
        return None
    return Decision(situation.status, DeletePreflight())


def _wait(situation: Situation) -> Decision:
    pods = situation.observed.preflight_pods
    held_up = obstacle(pods)
    if held_up is not None:
        return Decision(situation.to(Phase.PREFLIGHT, held_up.reason, held_up.message))
    refusal = situation.observed.refusal
    if not pods and refusal is not None:
        text = f"The cluster refuses the pod that checks the job: {refusal}"
        return Decision(situation.to(Phase.PREFLIGHT, PODS_REFUSED, text), requeue_after=REFUSED_SECONDS)
    text = "Checking model, data, output and memory before the job starts"
    return Decision(situation.to(Phase.PREFLIGHT, "Preflight", text), requeue_after=None if pods else REFUSED_SECONDS)


def _passed(situation: Situation) -> Decision:
    words = [word for pod in situation.observed.preflight_pods if (word := termination_message(pod)) is not None]
    said = next((word for word in words if word.exit_code == 0), TerminationMessage(exit_code=0))
    text = said.message or "Preflight has found nothing that is wrong"
    new = [warning[:MAX_WARNING] for warning in said.warnings]
    known = [warning for warning in situation.status.warnings if warning not in new]
    status = situation.to(Phase.STARTING, PASSED, text, warnings=[*known, *new][-MAX_WARNINGS:])
    return Decision(status, events=(Notice(PASSED, text),), requeue_after=0.0)


def _judged(situation: Situation, why: Mapping[str, Any]) -> Decision:
    if why.get("reason") == TOO_LONG:
        # What its earlier tries met is no verdict: it was still trying.
        return _inconclusive(situation, f"it took more than {duration(LIMIT_SECONDS)}")
    # One pod follows the other: at the last one the Job gave up.
    pods = sorted(situation.observed.preflight_pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    failure = classify_pod(pods[-1]) if pods else None
    if failure is None or not _is_decisive(failure):
        return _inconclusive(situation, failure.message if failure else "its pods are gone")
    advice = f". Advice: {failure.advice}" if failure.advice else ""
    decision = fail(situation, failure.cause, f"Preflight: {failure.message.rstrip('.')}{advice}")
    return Decision(decision.status, events=decision.events, valid=failure.cause is Cause.INFRASTRUCTURE)


def _is_decisive(failure: Failure) -> bool:
    """Whether the check said it itself, and nothing from outside explains it: a node that goes down breaks a lot."""
    return failure.exit_code in DECISIVE and failure.cause is CAUSE_OF_EXIT_CODE[failure.exit_code]


def _inconclusive(situation: Situation, why: str) -> Decision:
    """The job itself will show it."""
    text = f"Preflight did not come to its end ({why}); the job starts unchecked"
    status = situation.to(Phase.STARTING, INCONCLUSIVE, text)
    return Decision(status, events=(Notice(INCONCLUSIVE, text, warning=True),), requeue_after=0.0)
