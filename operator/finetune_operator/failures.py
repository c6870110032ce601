"""Pod evidence -> cause and advice. Pure.

Evidence is ranked, never timed: an error of a pod's own beats an outside force, which beats a broken collective,
since one culprit takes its peers down in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from pydantic import ValidationError

from finetune_api.contract import CAUSE_OF_EXIT_CODE, NEVER_RETRIED, Cause, ExitCode, TerminationMessage
from finetune_operator.cluster.port import Object
from finetune_operator.observed import (
    condition,
    is_deleting,
    is_silent,
    name,
    phase,
    trainer_state,
    uid,
    waiting_states,
)

MAX_TEXT = 1000
"""Characters of a foreign text that go into a message: enough for the sentence that matters."""
CAUSE_OF_SIGNAL = {
    4: Cause.APPLICATION, 6: Cause.APPLICATION, 7: Cause.APPLICATION, 8: Cause.APPLICATION, 11: Cause.APPLICATION,
}  # fmt: skip
"""Signals that a process brings upon itself; the others come from outside."""
SIGNAL_NAMES = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


class Rank(IntEnum):
    """Whose word counts when several pods failed; the lowest wins."""

    OWN = 0
    FORCE = 1
    PEER = 2


@dataclass(frozen=True)
class Failure:
    """Why a pod failed."""

    cause: Cause
    message: str
    advice: str = ""
    exit_code: int | None = None
    pod: str = ""
    pod_uid: str = ""
    node: str = ""
    rank: Rank = Rank.OWN
    log: str = ""
    """The last lines that the pod left: it is deleted when it has been replaced."""


@dataclass(frozen=True)
class Obstacle:
    """Why a pod does not start; it may still do so when somebody helps."""

    reason: str
    message: str


def classify(pods: Iterable[Object]) -> Failure | None:
    """The failure that a job's pods show together, or None while none has failed or is being taken away."""
    pods = tuple(pods)
    found = [failure for pod in pods if (failure := classify_pod(pod)) is not None]
    first = min(found, key=lambda failure: (failure.rank, failure.pod), default=None)
    # Peers notice a dead node before the cluster does.
    return _silent(pods) or first if first is not None and first.rank is Rank.PEER else first


def classify_pod(pod: Object) -> Failure | None:
    """Why this pod failed or is about to be stopped; None for one that is well, has succeeded or has not started."""
    failure = _from_exit(pod) or _from_pod(pod)
    return failure and replace(failure, pod=name(pod), pod_uid=uid(pod), node=_node(pod), log=_last_lines(pod))


def termination_message(pod: Object) -> TerminationMessage | None:
    """The trainer's last word, or None where it left none that can be read."""
    terminated = trainer_state(pod, "terminated")
    try:
        return TerminationMessage.model_validate_json((terminated or {}).get("message") or "")
    except ValidationError:
        return None


def _node(pod: Object) -> str:
    return str((pod.get("spec") or {}).get("nodeName") or "")


def _last_lines(pod: Object) -> str:
    said = termination_message(pod)
    return said.log if said is not None else _plain(str((trainer_state(pod, "terminated") or {}).get("message") or ""))


def _silent(pods: tuple[Object, ...]) -> Failure | None:
    pod = next(filter(is_silent, pods), None)
    if pod is None:
        return None
    text = f"Node {pod['spec'].get('nodeName')} with pod {name(pod)} no longer answers"
    return Failure(Cause.DISRUPTION, text, pod=name(pod), pod_uid=uid(pod), rank=Rank.FORCE)


def obstacle(pods: Iterable[Object]) -> Obstacle | None:
    """What holds pods up: an image, a missing Secret, no room. The one that a person must see to comes first."""
    pods = tuple(pods)
    waiting = next((item for pod in pods if (item := _waiting_obstacle(pod))), None)
    return waiting or _unschedulable(pods)


# --- from the container ----------------------------------------------------------------------------------------------


def _from_exit(pod: Object) -> Failure | None:
    terminated = trainer_state(pod, "terminated")
    if terminated is None or terminated.get("exitCode") == ExitCode.OK:
        return None
    code = int(terminated.get("exitCode", -1))
    if terminated.get("reason") == "OOMKilled":
        return _host_memory(code)
    if (
        _taken_away(pod) is not None
        and code not in NEVER_RETRIED
        and (code not in CAUSE_OF_EXIT_CODE or condition(pod, "DisruptionTarget") is not None)
    ):
        # What breaks while a node goes down says nothing about the job.
        return replace(_disruption(pod), exit_code=code)
    if code in CAUSE_OF_EXIT_CODE:
        return _spoken(pod, code)
    if terminated.get("reason") in ("StartError", "ContainerCannotRun"):
        return Failure(Cause.INFRASTRUCTURE, _foreign("The container could not be started", terminated), exit_code=code)
    return _signal(code) if code > 128 else _unknown(terminated, code)


def _spoken(pod: Object, code: int) -> Failure:
    """An exit code of the contract, with the trainer's own sentence where it arrived."""
    cause, rank = CAUSE_OF_EXIT_CODE[code], Rank.OWN
    if cause is Cause.DISRUPTION:
        return replace(_disruption(pod), exit_code=code)
    if code == ExitCode.UNAVAILABLE:
        rank = Rank.PEER
    said = termination_message(pod)
    if code == ExitCode.STALLED and said is not None and said.rank is None:
        # All of its ranks waited for others: the culprit is in another pod.
        rank = Rank.PEER
    if said is None or not said.message:
        text = _foreign(f"The trainer ended with exit code {code}", trainer_state(pod, "terminated") or {})
        return Failure(cause, text, DEFAULT_ADVICE.get(cause, ""), code, rank=rank)
    return Failure(cause, _short(said.message), _short(said.advice), code, rank=rank)


def _host_memory(code: int) -> Failure:
    return Failure(
        Cause.OUT_OF_MEMORY,
        "The kernel ended the trainer because it used more host memory than its limit (OOMKilled)",
        "raise resources.memory, or lower hyperparameters.dataWorkers or perDeviceBatchSize; /dev/shm and a CPU job's "
        "model count too",
        code,
    )


def _signal(code: int) -> Failure:
    number = code - 128
    cause = CAUSE_OF_SIGNAL.get(number, Cause.INFRASTRUCTURE)
    advice = "raise resources.sharedMemory" if number == 7 else ""
    text = f"The trainer was ended by {SIGNAL_NAMES.get(number, f'signal {number}')} (exit code {code})"
    return Failure(cause, text, advice, code, rank=Rank.OWN if cause is Cause.APPLICATION else Rank.FORCE)


def _unknown(terminated: Mapping[str, Any], code: int) -> Failure:
    advice = "check that the trainer image is the operator's own" if code in (126, 127) else ""
    return Failure(Cause.APPLICATION, _foreign(f"The trainer ended with exit code {code}", terminated), advice, code)


# --- from the pod ----------------------------------------------------------------------------------------------------

LIMIT_EXCEEDED = re.compile(r"exceeds? the (?:total )?limit|exceeded its local ephemeral storage limit", re.IGNORECASE)
"""How the kubelet words the eviction of a pod that used more than its own volume limit."""


def _from_pod(pod: Object) -> Failure | None:
    status = pod.get("status") or {}
    text = str(status.get("message") or "")
    if status.get("reason") == "Evicted" and LIMIT_EXCEEDED.search(text):
        return Failure(Cause.USAGE, f"The pod was evicted: {_short(text)}", _limit_advice(text))
    if _taken_away(pod) is not None:
        return _disruption(pod)
    if phase(pod) == "Failed":
        return _before_the_trainer(pod) or Failure(Cause.INFRASTRUCTURE, _rejected(status), rank=Rank.FORCE)
    return None


def _before_the_trainer(pod: Object) -> Failure | None:
    """An init container that has failed; the trainer has never started then."""
    for item in (pod.get("status") or {}).get("initContainerStatuses") or []:
        terminated = (item.get("state") or {}).get("terminated") or {}
        if code := int(terminated.get("exitCode") or 0):
            text = _foreign(f"Init container {item.get('name')} ended with exit code {code}", terminated)
            return Failure(Cause.APPLICATION, text, "see the log of that container; it is not the trainer's", code)
    return None


def _limit_advice(text: str) -> str:
    if '"shm"' in text:
        return "raise resources.sharedMemory"
    return "raise resources.scratch" if '"scratch"' in text else "write less outside of the output"


def _taken_away(pod: Object) -> str | None:
    """How the cluster, or somebody, says that the pod has to go; None when nobody does."""
    target = condition(pod, "DisruptionTarget")
    if target is not None:
        return str(target.get("message") or target.get("reason") or "disruption")
    status = pod.get("status") or {}
    if status.get("reason") in ("Evicted", "NodeLost", "NodeShutdown", "Shutdown", "Terminated", "Preempting"):
        return str(status.get("message") or status["reason"])
    return "it was deleted" if is_deleting(pod) else None


def _disruption(pod: Object) -> Failure:
    why = _taken_away(pod)
    place = f" on node {_node(pod)}" if _node(pod) else ""
    text = f"The pod{place} was stopped from outside: {_short(why)}" if why else f"The pod{place} was asked to stop"
    return Failure(Cause.DISRUPTION, text, rank=Rank.FORCE)


def _rejected(status: Mapping[str, Any]) -> str:
    reason, text = status.get("reason") or "no reason given", status.get("message") or ""
    return _short(f"The node did not run the pod ({reason}): {text}".rstrip(": "))


# --- pods that do not start ------------------------------------------------------------------------------------------

WAITING = {
    "ImagePullBackOff": "check the image's name, imagePullSecrets and the node's way to the registry",
    "ErrImagePull": "check the image's name, imagePullSecrets and the node's way to the registry",
    "ErrImageNeverPull": "import the image on the node, or set the operator's image pull policy to IfNotPresent",
    "InvalidImageName": "correct the operator's trainer image",
    "CreateContainerConfigError": "create the Secret or ConfigMap, or correct its name in a new job",
    "CreateContainerError": "see the pod's events",
    "RunContainerError": "see the pod's events",
    "CrashLoopBackOff": "see the logs of that container; it is not the trainer's",
}


def _waiting_obstacle(pod: Object) -> Obstacle | None:
    for waiting in waiting_states(pod):
        reason = str(waiting.get("reason") or "")
        if reason in WAITING:
            text = _short(str(waiting.get("message") or reason))
            return Obstacle(
                reason, f"Container {waiting['container']} of pod {name(pod)} cannot start: {text}; {WAITING[reason]}"
            )
    return None


def _unschedulable(pods: tuple[Object, ...]) -> Obstacle | None:
    stuck = [(pod, item) for pod in pods if (item := condition(pod, "PodScheduled", "False")) is not None]
    if not stuck:
        return None
    text = _short(str(stuck[0][1].get("message") or "no node fits"))
    if stuck[0][1].get("reason") == "SchedulingGated":
        return Obstacle("SchedulingGated", f"{len(stuck)} of {len(pods)} pods wait behind a scheduling gate: {text}")
    return Obstacle("Unschedulable", f"{len(stuck)} of {len(pods)} pods cannot be scheduled: {text}")


# --- words -----------------------------------------------------------------------------------------------------------

DEFAULT_ADVICE = {
    Cause.USAGE: "correct the spec in a new job; the pod's log names the field",
    Cause.DATA: "correct the dataset; the pod's log names file and line",
    Cause.PERMISSION: "check the Secret in storage.s3.secretName or the service account's role",
    Cause.DIVERGED: "lower hyperparameters.learningRate or raise warmupRatio",
    Cause.OUT_OF_MEMORY: "lower hyperparameters.perDeviceBatchSize and raise gradientAccumulationSteps, or maxLength",
}


def _foreign(what: str, terminated: Mapping[str, Any]) -> str:
    """A sentence with the last line that the container left, which is where Python names the error."""
    lines = [line.strip() for line in _plain(str(terminated.get("message") or "")).splitlines() if line.strip()]
    return f"{what}: {_short(lines[-1])}" if lines else what


def _plain(text: str) -> str:
    """JSON of another kind, or cut off, is no sentence for people."""
    return "" if text.lstrip().startswith(("{", "[")) else text


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
