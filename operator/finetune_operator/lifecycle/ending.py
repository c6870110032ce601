"""Ends of a job, and refusals. Terminal is written only when no pod is left alive."""

from __future__ import annotations

import re
from datetime import datetime

from finetune_api.contract import CAUSE_OF_EXIT_CODE, Cause, Result, Stage
from finetune_api.job import FineTuneJob, ObjectMeta
from finetune_api.status import CheckpointStatus, FineTuneJobStatus, OutputStatus, Phase, ProgressStatus
from finetune_operator.failures import Failure, classify, termination_message
from finetune_operator.lifecycle.conditions import Stamp, with_conditions, with_invalid
from finetune_operator.lifecycle.decision import TEARDOWN_SECONDS, Decision, Delete, Notice, Situation, clip
from finetune_operator.lifecycle.text import count, number, numbers, warned
from finetune_operator.observed import (
    NAMESPACE_ENDS,
    Observed,
    completed,
    controller_uid,
    current_pods,
    failed,
    index,
    live_pods,
    phase,
    timestamp,
    uid,
)
from finetune_operator.settings import Settings


def finish(situation: Situation) -> Decision | None:
    """The Indexed Job has ended, or None while it has not."""
    workload = situation.observed.workload
    if workload is None or not (completed(workload) or failed(workload)):
        return None
    live = live_pods(situation.observed)
    if live:
        text = f"The work is over; waiting for {count(len(live))} to stop"
        return Decision(situation.to(situation.status.phase, "Stopping", text), requeue_after=TEARDOWN_SECONDS)
    if completed(workload):
        return succeed(situation)
    failure = _job_failure(situation)
    advice = f". Advice: {failure.advice}" if failure.advice else ""
    return fail(situation, failure.cause, failure.message.rstrip(".") + advice)


def fail(situation: Situation, cause: Cause, message: str) -> Decision:
    """For good: nothing is created for this job any more."""
    status = situation.to(Phase.FAILED, cause.value, message, completion_time=situation.time)
    return Decision(status, events=(Notice("Failed", f"{cause.value}: {message}", warning=True),))


def succeed(situation: Situation) -> Decision:
    """With the result from index 0's termination message; where that was lost, result.json in the output has it."""
    result = _result(situation)
    message = warned(_success_sentence(situation, result), situation.status.warnings)
    changes = {"completion_time": situation.time, "incident": None, **(_delivered(situation, result) if result else {})}
    status = situation.to(Phase.SUCCEEDED, "Succeeded", message, **changes)
    return Decision(status, events=(Notice("Succeeded", message),))


def _result(situation: Situation) -> Result | None:
    workload = situation.observed.workload
    owner = uid(workload) if workload else ""
    for pod in situation.observed.pods:
        if controller_uid(pod) == owner and index(pod) == 0 and phase(pod) == "Succeeded":
            said = termination_message(pod)
            if said is not None and said.result is not None:
                return said.result
    return None


def _delivered(situation: Situation, result: Result) -> dict[str, object]:
    """Fields of status that a result fills."""
    checkpoint = result.checkpoint
    return {
        "output": OutputStatus.from_wire(result.output.to_wire()),
        "metrics": numbers(result.metrics),
        "baseline": numbers(result.baseline),
        "checkpoint": CheckpointStatus.from_wire(checkpoint.to_wire()) if checkpoint else situation.status.checkpoint,
        "progress": _final_progress(situation, result),
    }


def _final_progress(situation: Situation, result: Result) -> ProgressStatus:
    """The last one that was read, at its end."""
    last = situation.status.progress or ProgressStatus()
    changes = {
        "stage": Stage.FINISHED.value,
        "step": result.steps,
        "total_steps": result.steps,
        "percent": 100,
        "steps": f"{result.steps}/{result.steps}",
        "epoch": f"{result.epochs:.2f}" if result.epochs is not None else last.epoch,
        "loss": number(result.loss) if result.loss is not None else last.loss,
        "eta_seconds": None,
        "eta": None,
        "updated_at": situation.time,
    }
    return last.model_copy(update=changes)


def _success_sentence(situation: Situation, result: Result | None) -> str:
    if result is None:
        uri = situation.job.spec.output.uri.rstrip("/")
        return f"Finished; the pod's last message was lost, the details are in {uri}/result.json"
    loss = result.metrics.get("eval_loss")
    early = f" (stopped early: {result.stopped_early})" if result.stopped_early else ""
    chosen = f", with the weights of step {result.exported_step}" if _chosen(result) else ""
    quality = f", eval_loss {number(loss)}" if loss is not None else ""
    return f"The {result.output.kind} is at {result.output.uri} after {result.steps} steps{early}{chosen}{quality}"


def _chosen(result: Result) -> bool:
    return result.exported_step not in (None, result.steps)


def _job_failure(situation: Situation) -> Failure:
    """Why the Indexed Job gave up: its pods say it best, the Job's own condition if they are gone."""
    found = classify(current_pods(situation.observed))
    if found is not None:
        return found
    condition = failed(situation.observed.workload or {}) or {}
    text = str(condition.get("message") or condition.get("reason") or "the Job failed")
    code = re.search(r"exit code (\d+)", text)
    cause = CAUSE_OF_EXIT_CODE.get(int(code[1]), Cause.APPLICATION) if code else Cause.APPLICATION
    return Failure(cause, f"The Job failed and its pods are gone: {text}")


def refused(
    job: FineTuneJob, observed: Observed, now: datetime, settings: Settings, *, message: str, final: bool
) -> Decision:
    """The API server did not take a child.

    Args:
        final: it calls the object invalid. The spec cannot be changed, so trying again cannot help: the job fails,
            as soon as no pod is left. Otherwise (quota, a name that is taken) it waits and is tried again.
    """
    situation = Situation(job, observed, now, settings, job.status)
    if NAMESPACE_ENDS in message and observed.workload is not None:
        # It would hold its last pod, and with that the namespace, for ever: see finetune_operator.lifecycle.held.
        return Decision(job.status, Delete())
    if not final:
        phase_now = job.status.phase if job.status.attempt else Phase.BLOCKED
        status = situation.to(phase_now, "Refused", f"Waiting, and trying again: {message}")
        return Decision(with_conditions(situation, status), events=(Notice("Refused", message, warning=True),))
    if live_pods(observed):
        return Decision(with_conditions(situation, situation.to(job.status.phase, "Stopping", message)))
    decision = fail(situation, Cause.USAGE, f"The API server refuses what this job becomes: {message}")
    return Decision(with_conditions(situation, decision.status, valid=False), events=decision.events)


def unreadable(metadata: ObjectMeta, status: FineTuneJobStatus, now: datetime, message: str) -> Decision:
    """An object that this release cannot read, made by another one: nothing is touched, whatever runs goes on."""
    phase_now = status.phase if status.attempt else Phase.BLOCKED
    text = clip(f"This operator cannot read the spec: {message}")
    told = status.model_copy(update={"phase": phase_now, "reason": "Unreadable", "message": text})
    return Decision(with_invalid(Stamp(metadata.generation, timestamp(now)), told))
