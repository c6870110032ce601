"""The rules of Kubernetes' Job controller that the product relies on, for Indexed Jobs, as pure functions.

Kept are: names, labels and annotations of pods, suspension, the pod failure policy, the back-off of each index, the
tracking finalizer (the last failed pod of an index keeps it until it is replaced, and Jobs that are suspended
replace nothing), replacement only after a pod has really ended, the deadline of the whole Job, and the conditions in
their order.
Not kept are Jobs that are not indexed, and the back-off limit of each index (the operator's Jobs have none that
matters).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_operator.cluster.pods import INDEX, ended, exit_codes, finished_at, has_condition, index_of
from finetune_operator.cluster.port import JOB, POD, TRACKING, Object
from finetune_operator.cluster.rules import clone, key_of, timestamp

FAILURES = "batch.kubernetes.io/job-index-failure-count"
MAX_BACK_OFF_SECONDS = 600.0


@dataclass
class Step:
    """What one look at a Job leads to."""

    status: Object
    create: dict[int, int] = field(default_factory=dict)
    """Index -> failures of that index so far."""
    delete: list[Object] = field(default_factory=list)
    release: list[Object] = field(default_factory=list)
    """Pods that are counted, so that they may go."""
    wait: float | None = None
    """Seconds until the next pod may be created, or the Job's time is over."""


def pod_of(job: Object, index: int, failures: int, suffix: str) -> Object:
    """The pod that the Job controller makes for an index."""
    name, uid, template = job["metadata"]["name"], job["metadata"]["uid"], clone(job["spec"]["template"])
    metadata = template.get("metadata") or {}
    labels = {
        **metadata.get("labels", {}),
        "job-name": name,
        "batch.kubernetes.io/job-name": name,
        "batch.kubernetes.io/controller-uid": uid,
        INDEX: str(index),
    }
    owner = {"apiVersion": JOB.api_version, "kind": JOB.kind, "name": name, "uid": uid, "controller": True}
    for container in template["spec"]["containers"]:
        reference = {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}
        container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": reference})
    return {
        "apiVersion": POD.api_version,
        "kind": POD.kind,
        "metadata": {
            "name": f"{name}-{index}-{suffix}",
            "namespace": key_of(job).namespace,
            "labels": labels,
            "annotations": {**metadata.get("annotations", {}), INDEX: str(index), FAILURES: str(failures)},
            "ownerReferences": [{**owner, "blockOwnerDeletion": True}],
            "finalizers": [TRACKING],
        },
        "spec": {**template["spec"], "hostname": f"{name}-{index}"},
    }


def look_at(job: Object, pods: Sequence[Object], now: datetime, back_off: float) -> Step:
    """One pass of the Job controller over a Job and its pods; back_off is in seconds."""
    look = _Look(job, pods, now, back_off)
    if not (look.conditions.is_true("Complete") or look.conditions.is_true("Failed")):
        look.decide()
    elif look.tracked:
        look.step.release = look.tracked
    return look.step


class _Conditions:
    """The conditions of a status; one that does not flip stays as it is."""

    def __init__(self, status: Object, now: datetime) -> None:
        self._items: list[dict[str, str]] = status.setdefault("conditions", [])
        self._now = timestamp(now)

    def is_true(self, kind: str) -> bool:
        return any(item["type"] == kind and item["status"] == "True" for item in self._items)

    def told(self, kind: str) -> tuple[str, str] | None:
        """Its reason and message."""
        return next(((item["reason"], item["message"]) for item in self._items if item["type"] == kind), None)

    def set(self, kind: str, value: bool, reason: str, message: str) -> None:
        if value == self.is_true(kind):
            return
        self._items[:] = [item for item in self._items if item["type"] != kind]
        new = {"type": kind, "status": str(value), "reason": reason, "message": message}
        self._items.append({**new, "lastTransitionTime": self._now})


class _Look:
    """One look at a Job: the steps follow each other in `decide`."""

    def __init__(self, job: Object, pods: Sequence[Object], now: datetime, back_off: float) -> None:
        self.job, self.pods, self.now, self.back_off = job, pods, now, back_off
        self.spec = job["spec"]
        self.status = clone(job.get("status") or {})
        self.step = Step(self.status)
        self.conditions = _Conditions(self.status, now)
        self.completions: int = self.spec.get("completions", 1)
        self.suspended = bool(self.spec.get("suspend"))
        self.tracked = [pod for pod in pods if TRACKING in pod["metadata"].get("finalizers", [])]
        self.alive = [pod for pod in pods if not ended(pod)]
        succeeded = {index_of(pod) for pod in pods if pod["status"]["phase"] == "Succeeded"}
        self.done = _indexes(self.status.get("completedIndexes", "")) | succeeded

    def decide(self) -> None:
        self._suspend_or_start()
        failure = self._failure()
        if failure is not None:
            self.conditions.set("FailureTarget", True, *failure)
        if failure is not None or self.suspended:
            self.step.delete = [pod for pod in self.alive if not _is_doomed(pod)]
        else:
            self._fill()
        self._finish(failure)
        self._release()
        self._count()

    def _suspend_or_start(self) -> None:
        if self.suspended:
            self.conditions.set("Suspended", True, "JobSuspended", "Job suspended")
            self.status.pop("startTime", None)
        else:
            self.conditions.set("Suspended", False, "JobResumed", "Job resumed")
            self.status.setdefault("startTime", timestamp(self.now))

    def _failure(self) -> tuple[str, str] | None:
        """(reason, message) why the Job fails: a rule fits a pod that failed, too many failed, or it took too long."""
        earlier = self.conditions.told("FailureTarget")
        if earlier is not None:
            return earlier
        for pod in self.tracked:
            if _has_failed(pod) and self._action(pod) == "FailJob":
                container, code = next((item for item in exit_codes(pod).items() if item[1]), ("", 0))
                text = f"Container {container} for pod {key_of(pod)} failed with exit code {code} matching FailJob rule"
                return "PodFailurePolicy", text
        limit, counted = self.spec.get("backoffLimit"), self.status.get("failed", 0)
        failed = counted + sum(_has_failed(pod) and self._action(pod) != "Ignore" for pod in self.tracked)
        if limit is not None and failed > limit:
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        left = self._time_left()
        if left is not None and left <= 0:
            return "DeadlineExceeded", "Job was active longer than specified deadline"
        return None

    def _time_left(self) -> float | None:
        """Seconds until the deadline, which is counted from the start or the last resumption."""
        limit, started = self.spec.get("activeDeadlineSeconds"), self.status.get("startTime")
        if limit is None or started is None:
            return None
        return float(limit) - (self.now - datetime.fromisoformat(started)).total_seconds()

    def _fill(self) -> None:
        """Create what is missing, each index after its own back-off and only when its last pod has ended."""
        present = {index_of(pod) for pod in self.alive}
        waits = []
        for index in range(self.completions):
            if index in self.done or index in present:
                continue
            last = self._last_failed(index)
            failures = _failures(last) + 1 if last else 0
            wait = self._wait(last, failures)
            if wait > 0:
                waits.append(wait)
            else:
                self.step.create[index] = failures
        if (left := self._time_left()) is not None:
            waits.append(left)
        self.step.wait = min(waits, default=None)

    def _wait(self, last: Object | None, failures: int) -> float:
        if last is None:
            return 0.0
        pause = min(self.back_off * 2.0 ** (failures - 1), MAX_BACK_OFF_SECONDS)
        return pause - (self.now - finished_at(last)).total_seconds()

    def _finish(self, failure: tuple[str, str] | None) -> None:
        """Complete or Failed, once no pod is left that runs."""
        if len(self.done) == self.completions:
            kind, reason, message = "Complete", "CompletionsReached", "Reached expected number of succeeded pods"
            self.conditions.set("SuccessCriteriaMet", True, reason, message)
        elif failure is not None:
            kind, (reason, message) = "Failed", failure
        else:
            return
        if not self.alive:
            self.conditions.set(kind, True, reason, message)
            if kind == "Complete":
                self.status["completionTime"] = timestamp(self.now)

    def _release(self) -> None:
        """Let go of pods that ended or are deleted here, but for those that still stand for an index's back-off."""
        finished = self.conditions.is_true("Complete") or self.conditions.is_true("Failed")
        deleted = [pod for pod in self.tracked if pod in self.step.delete]
        over = [pod for pod in self.tracked if ended(pod) and (finished or not self._stands_for_its_index(pod))]
        self.step.release = deleted + over

    def _stands_for_its_index(self, pod: Object) -> bool:
        index = index_of(pod)
        replaced = index in self.done or index in self.step.create
        replaced = replaced or any(index_of(other) == index for other in self.alive if other not in self.step.delete)
        return not replaced and pod is self._last_failed(index)

    def _count(self) -> None:
        active = [pod for pod in self.alive if not _is_doomed(pod) and pod not in self.step.delete]
        failed = [pod for pod in self.step.release if _has_failed(pod) and self._action(pod) != "Ignore"]
        self.status["active"] = len(active) + len(self.step.create)
        self.status["ready"] = sum(has_condition(pod, "Ready") for pod in active)
        self.status["terminating"] = len(self.alive) - len(active)
        self.status["succeeded"] = len(self.done)
        self.status["completedIndexes"] = _text(self.done)
        self.status["failed"] = self.status.get("failed", 0) + len(failed)

    def _last_failed(self, index: int) -> Object | None:
        failed = [pod for pod in self.tracked if _has_failed(pod) and index_of(pod) == index]
        return max(failed, key=lambda pod: (_failures(pod), finished_at(pod)), default=None)

    def _action(self, pod: Object) -> str:
        """The action of the first rule that fits a failed pod; Count where none does."""
        rules = self.spec.get("podFailurePolicy", {}).get("rules", [])
        return next((str(rule["action"]) for rule in rules if _fits(rule, pod)), "Count")


def _fits(rule: Mapping[str, Any], pod: Object) -> bool:
    conditions = rule.get("onPodConditions") or []
    if any(has_condition(pod, item["type"], item.get("status", "True")) for item in conditions):
        return True
    return "onExitCodes" in rule and _codes_match(rule["onExitCodes"], exit_codes(pod))


def _codes_match(rule: Mapping[str, Any], codes: Mapping[str, int]) -> bool:
    """Exit code 0 never matches; without a container name every container is looked at."""
    only = rule.get("containerName")
    looked_at = [code for name, code in codes.items() if code and only in (None, name)]
    return any((code in rule["values"]) == (rule["operator"] == "In") for code in looked_at)


def _has_failed(pod: Object) -> bool:
    return bool(pod["status"]["phase"] == "Failed")


def _is_doomed(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _failures(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][FAILURES])


def _indexes(text: str) -> set[int]:
    """`0,2-4` as a set."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return {index for part in ranges for index in range(int(part[0]), int(part[-1]) + 1)}


def _text(indexes: Iterable[int]) -> str:
    """A set as `0,2-4`."""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
