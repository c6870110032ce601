"""What Kueue does to Jobs, as far as they can tell. Read from the sources of Kueue 0.13 (pkg/controller/jobframework,
pkg/controller/jobs/job, pkg/podset), and seen with it in tests/e2e/test_kueue.py."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.contract import ANNOTATION_STOPPING, LABEL_QUEUE
from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import JOB, JsonPatch, Object
from finetune_operator.cluster.rules import clone, key_of

TEMPLATE = "/spec/template"


@dataclass
class Workload:
    """What Kueue keeps of a Job: its pods as it first saw them, and whether they may run."""

    template: Object
    count: int
    admitted: bool = False
    evicted: str | None = None
    """Why, from then on until it is let in again."""

    def is_of(self, job: Object) -> bool:
        """Whether the Job is still what this was made from: annotations do not count, nor do tolerations of one that
        runs."""
        mine, its = self.template["spec"], job["spec"]["template"]["spec"]
        fields = ("containers", "initContainers", *(() if self.admitted else ("tolerations",)))
        return self.count == job["spec"]["parallelism"] and all(mine.get(name) == its.get(name) for name in fields)


class Kueue:
    """One queue with room for `room` Jobs, which are let in in the order of their names.

    Args:
        everything: it manages Jobs that name no queue as well; those it never lets in.
    """

    def __init__(self, cluster: MemoryCluster, room: int = 1, everything: bool = False) -> None:
        self.room = room
        self._everything = everything
        self._cluster = cluster
        self._workloads: dict[str, Workload] = {}

    async def sync(self) -> None:
        """Look at every Job until there is nothing more to do."""
        for _ in range(4):
            jobs = await self._cluster.list(JOB, None, {} if self._everything else {LABEL_QUEUE: ""})
            self._workloads = {
                uid: known for job in jobs if (known := self._workloads.get(uid := job["metadata"]["uid"]))
            }
            for job in jobs:
                await self._look_at(job)
            self._let_in(jobs)

    async def preempt(self, job: Object, why: str) -> None:
        """Take a place for somebody else, and with it that of a Job that was let in."""
        self.room -= 1
        workload = self._workloads.get(job["metadata"]["uid"])
        if workload is None or not workload.admitted:
            return
        workload.evicted = why
        await self._look_at(job)

    def _let_in(self, jobs: list[Object]) -> None:
        for job in jobs:
            workload = self._workloads.get(job["metadata"]["uid"])
            taken = sum(known.admitted for known in self._workloads.values())
            if workload is not None and not workload.admitted and taken < self.room and _queue(job):
                workload.admitted, workload.evicted = True, None

    async def _look_at(self, job: Object) -> None:
        uid, suspended = job["metadata"]["uid"], _is_suspended(job)
        workload = self._workloads.get(uid)
        if workload is not None and not workload.is_of(job):
            if suspended and not workload.admitted:
                workload.template, workload.count = clone(job["spec"]["template"]), job["spec"]["parallelism"]
                return
            await self._stop(job, workload, "No matching Workload; restoring pod templates")
            del self._workloads[uid]
        elif workload is None and not _is_active(job):
            self._workloads[uid] = Workload(clone(job["spec"]["template"]), job["spec"]["parallelism"])
        elif workload is None:
            await self._stop(job, None, "Missing Workload; unable to restore pod templates")
        elif workload.evicted is not None:
            await self._stop(job, workload, workload.evicted)
            workload.admitted = workload.admitted and _is_active(job)
        elif workload.admitted and suspended:
            await self._patch(job, [_suspension(False)])
        elif not workload.admitted:
            await self._stop(job, workload, "Not admitted by cluster queue")

    async def _stop(self, job: Object, workload: Workload | None, why: str) -> None:
        """Suspend it, and make its pods again what they were when Kueue first saw them. It says so last."""
        annotations = {**(job["metadata"].get("annotations") or {})}
        told = not _is_suspended(job)
        if told:
            mark = {"op": "add", "path": "/metadata/annotations", "value": {**annotations, ANNOTATION_STOPPING: "true"}}
            await self._patch(job, [_suspension(True), mark])
        if (job.get("status") or {}).get("startTime"):
            await self._patch(job, [{"op": "remove", "path": "/status/startTime"}], "status")
        restored = _restored(job, workload) if workload is not None else []
        if restored and _is_active(job):
            # The API server refuses that as yet, and Kueue tries again.
            return
        annotations.pop(ANNOTATION_STOPPING, None)
        await self._patch(job, [*restored, {"op": "add", "path": "/metadata/annotations", "value": annotations}])
        if told:
            await self._cluster.emit(job, "Stopped", why)

    async def _patch(self, job: Object, patch: JsonPatch, subresource: str | None = None) -> None:
        await self._cluster.patch(JOB, key_of(job), patch, subresource)


def _restored(job: Object, workload: Workload) -> JsonPatch:
    mine, its = workload.template, job["spec"]["template"]
    parts = {
        "/metadata/annotations": (its["metadata"].get("annotations"), mine["metadata"].get("annotations")),
        "/metadata/labels": (its["metadata"].get("labels"), mine["metadata"].get("labels")),
        "/spec/tolerations": (its["spec"].get("tolerations"), mine["spec"].get("tolerations")),
    }
    return [
        {"op": "add", "path": f"{TEMPLATE}{path}", "value": old} for path, (new, old) in parts.items() if new != old
    ]


def _suspension(value: bool) -> Object:
    return {"op": "replace", "path": "/spec/suspend", "value": value}


def _is_suspended(job: Object) -> bool:
    """One that is still being stopped is not yet what it is to be."""
    stopping = (job["metadata"].get("annotations") or {}).get(ANNOTATION_STOPPING)
    return bool(job["spec"]["suspend"]) and stopping != "true"


def _is_active(job: Object) -> bool:
    return bool((job.get("status") or {}).get("active"))


def _queue(job: Object) -> str | None:
    queue: str | None = job["metadata"].get("labels", {}).get(LABEL_QUEUE)
    return queue
