"""What a pod object says about itself, and the states that a node writes into it."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.cluster.port import Object
from finetune_operator.cluster.rules import timestamp

INDEX = "batch.kubernetes.io/job-completion-index"


def is_owned_by(pod: Object, owner: Object) -> bool:
    """Whether an owner reference names this very incarnation."""
    uid = owner["metadata"]["uid"]
    return any(reference["uid"] == uid for reference in pod["metadata"].get("ownerReferences", []))


def ended(pod: Object) -> bool:
    """Whether nothing of it runs any more."""
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def index_of(pod: Object) -> int:
    """The completion index."""
    return int(pod["metadata"]["annotations"][INDEX])


def has_condition(pod: Object, kind: str, status: str = "True") -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(item["type"] == kind and item["status"] == status for item in conditions)


def exit_codes(pod: Object) -> dict[str, int]:
    """Container -> exit code, of those that ended."""
    statuses = pod["status"].get("containerStatuses", [])
    return {item["name"]: item["state"]["terminated"]["exitCode"] for item in statuses if "terminated" in item["state"]}


def finished_at(pod: Object) -> datetime:
    """When its last container ended; for a pod that never had one, when it was made."""
    statuses = pod["status"].get("containerStatuses", [])
    times = [item["state"]["terminated"]["finishedAt"] for item in statuses if "terminated" in item["state"]]
    text = max(times, default=pod["metadata"]["creationTimestamp"])
    return datetime.fromisoformat(text)


def running_status(pod: Object, address: str, now: datetime) -> Object:
    """The status of a pod whose container has started."""
    started = timestamp(now)
    container = {"name": _container(pod), "ready": True, "started": True, "restartCount": 0}
    return {
        "phase": "Running",
        "podIP": address,
        "startTime": started,
        "conditions": [_condition("PodScheduled", started), _condition("Ready", started)],
        "containerStatuses": [{**container, "state": {"running": {"startedAt": started}}}],
    }


def waiting_status(pod: Object, reason: str, message: str, now: datetime) -> Object:
    """The status of a pod whose container cannot be started."""
    container = {"name": _container(pod), "ready": False, "started": False, "restartCount": 0}
    return {
        "phase": "Pending",
        "conditions": [_condition("PodScheduled", timestamp(now))],
        "containerStatuses": [{**container, "state": {"waiting": {"reason": reason, "message": message}}}],
    }


def ended_status(pod: Object, code: int, reason: str, message: str, now: datetime) -> Object:
    """The status of a pod whose container has ended."""
    before = pod["status"]
    started = before.get("startTime", timestamp(now))
    terminated = {
        "exitCode": code,
        "reason": reason,
        "message": message,
        "startedAt": started,
        "finishedAt": timestamp(now),
    }
    container = {"name": _container(pod), "ready": False, "started": False, "restartCount": 0}
    return {
        **before,
        "phase": "Failed" if code else "Succeeded",
        "conditions": [item for item in before.get("conditions", []) if item["type"] != "Ready"],
        "containerStatuses": [{**container, "state": {"terminated": terminated}}],
    }


def lost_status(pod: Object, message: str, now: datetime) -> Object:
    """The status of a pod whose node went away with it: nobody's fault, and no exit code."""
    target = {**_condition("DisruptionTarget", timestamp(now)), "reason": "DeletionByPodGC", "message": message}
    before = {key: value for key, value in pod["status"].items() if key != "containerStatuses"}
    return {**before, "phase": "Failed", "reason": "NodeLost", "message": message, "conditions": [target]}


def _container(pod: Object) -> str:
    name: str = pod["spec"]["containers"][0]["name"]
    return name


def _condition(kind: str, since: str) -> dict[str, str]:
    return {"type": kind, "status": "True", "lastTransitionTime": since}
