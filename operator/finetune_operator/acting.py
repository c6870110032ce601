"""What a reconcile does to the children of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from finetune_api.contract import ANNOTATION_ATTEMPT, ANNOTATION_NODES, ANNOTATION_STOPPING
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.pods import lost_status
from finetune_operator.cluster.port import (
    FINE_TUNE_JOB,
    JOB,
    KINDS,
    POD,
    Cluster,
    ClusterError,
    ConflictError,
    JsonPatch,
    Key,
    Object,
)
from finetune_operator.cluster.rules import key_of
from finetune_operator.lifecycle import (
    Action,
    Create,
    CreatePreflight,
    Delete,
    DeletePreflight,
    Expire,
    ForgetStart,
    Free,
    Number,
    Remove,
    Resume,
    Shrink,
    Suspend,
    WorkloadAction,
)
from finetune_operator.observed import (
    Observed,
    controller_uid,
    is_tracked,
    queue_of,
    told_nodes,
    workload_nodes,
)
from finetune_operator.plan import Manifests, plan
from finetune_operator.plan.names import selector
from finetune_operator.settings import Settings

ATTEMPT_PATH, NODES_PATH, STOPPING_PATH = (
    f"{place}/metadata/annotations/" + name.replace("~", "~0").replace("/", "~1")
    for place, name in (
        ("/spec/template", ANNOTATION_ATTEMPT),
        ("/spec/template", ANNOTATION_NODES),
        ("", ANNOTATION_STOPPING),
    )
)


class NameTakenError(ClusterError):
    """An object of somebody else has a child's name; it is never touched."""


class Actor:
    """Carries out actions, each idempotent and bound to the incarnations that were seen.

    Args:
        clock: the present in UTC.
    """

    def __init__(self, cluster: Cluster, settings: Settings, clock: Callable[[], datetime]) -> None:
        self._cluster = cluster
        self._settings = settings
        self._clock = clock

    async def act(self, key: Key, job: FineTuneJob, observed: Observed, action: Action) -> Observed:
        """Do it. Returns the children as they are afterwards."""
        match action:
            case Expire():
                await self._cluster.delete(FINE_TUNE_JOB, key, job.metadata.uid)
                return observed
            case Free(pods) | Remove(pods):
                drop = self._free if isinstance(action, Free) else self._remove
                for pod in pods:
                    await drop(pod)
                # What was deleted may live on until it has ended.
                left = await self._cluster.list(POD, key.namespace, selector(key.name))
                return replace(observed, pods=tuple(left))
            case CreatePreflight():
                return replace(observed, preflight=await self._create_preflight(job))
            case DeletePreflight():
                if observed.preflight is not None:
                    await self._delete(observed.preflight)
                return replace(observed, preflight=None, preflight_pods=())
            case Create(attempt):
                return replace(observed, workload=await self._create(job, attempt))
            case _:
                workload = observed.workload
                assert workload is not None, "all other actions are about a Job that was seen"
                return replace(observed, workload=await self._act_on_workload(job, workload, action))

    async def _act_on_workload(self, job: FineTuneJob, workload: Object, action: WorkloadAction) -> Object | None:
        """Do it. Returns the Indexed Job as it is afterwards, or None when it is gone."""
        match action:
            case Delete():
                await self._delete(workload)
                return None
            case ForgetStart():
                return await self._patch(workload, [{"op": "remove", "path": "/status/startTime"}], "status")
            case Suspend():
                patch = _stopped(workload)
            case Shrink(nodes):
                patch = [*_suspended(True), *_sized(workload, nodes)]
            case Number(attempt):
                # Whatever was deleted meanwhile is there again before the pods need it.
                await self._create_needs(job, attempt)
                patch = [*_numbered(attempt), *_marked(workload, attempt), *_released(workload)]
            case Resume(attempt, nodes):
                needs = await self._create_needs(job, attempt)
                changes = [*_moved(workload, needs.workload), *_sized(workload, nodes), *_told(workload, nodes)]
                patch = [*_numbered(attempt), *changes, *_suspended(False)]
        return await self._patch(workload, patch)

    async def _create(self, job: FineTuneJob, attempt: int) -> Object:
        """The Job last: when it is there, all that its pods need is there."""
        manifests = await self._create_needs(job, attempt)
        return await self._ensure(job, manifests.workload)

    async def _create_preflight(self, job: FineTuneJob) -> Object | None:
        manifests = plan(job, self._settings)
        await self._ensure_all(job, manifests.needs_of_preflight())
        return await self._ensure(job, manifests.preflight) if manifests.preflight else None

    async def _create_needs(self, job: FineTuneJob, attempt: int) -> Manifests:
        manifests = plan(job, self._settings, attempt)
        await self._ensure_all(job, manifests.needs())
        return manifests

    async def _ensure_all(self, job: FineTuneJob, manifests: Sequence[Object]) -> None:
        """All at once, since none needs another one. What fails is told when nothing is under way any more."""
        answers = await asyncio.gather(*(self._ensure(job, manifest) for manifest in manifests), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    async def _ensure(self, job: FineTuneJob, manifest: Object) -> Object:
        """Create it, or find what an earlier pass has created. Nothing of anybody else is ever overwritten."""
        try:
            return await self._cluster.create(manifest)
        except ConflictError:
            kind, metadata = KINDS[manifest["kind"]], manifest["metadata"]
            found = await self._cluster.read(kind, key_of(manifest))
        if found is None or found["metadata"].get("deletionTimestamp"):
            raise NameTakenError(f"{kind.kind} {metadata['name']} of an earlier run is still being deleted")
        if controller_uid(found) != job.metadata.uid:
            raise NameTakenError(
                f"{kind.kind} {metadata['name']} exists and does not belong to this job; delete it, or give the job "
                "another name"
            )
        return found

    async def _free(self, pod: Object) -> None:
        """Say in its node's place that a pod has ended, where the Job controller waits for that; then drop it."""
        metadata, message = pod["metadata"], "the node of this pod no longer answers"
        if is_tracked(pod):
            patch: JsonPatch = [
                {"op": "test", "path": "/metadata/uid", "value": metadata["uid"]},
                {"op": "add", "path": "/status", "value": lost_status(pod, message, self._clock())},
            ]
            await self._cluster.patch(POD, key_of(pod), patch, "status")
        await self._cluster.delete(POD, key_of(pod), metadata["uid"], grace_seconds=0)

    async def _remove(self, pod: Object) -> None:
        await self._cluster.delete(POD, key_of(pod), pod["metadata"]["uid"])

    async def _delete(self, child: Object) -> None:
        await self._cluster.delete(JOB, key_of(child), child["metadata"]["uid"])

    async def _patch(self, workload: Object, patch: JsonPatch, subresource: str | None = None) -> Object | None:
        guard = {"op": "test", "path": "/metadata/uid", "value": workload["metadata"]["uid"]}
        return await self._cluster.patch(JOB, key_of(workload), [guard, *patch], subresource)


def _moved(workload: Object, wanted: Object) -> JsonPatch:
    """Where the next pods run, if that is to be elsewhere; all else of a template is fixed."""
    path, name = "/spec/template/spec/affinity", "nodeAffinity"
    new = (wanted["spec"]["template"]["spec"].get("affinity") or {}).get(name)
    old = workload["spec"]["template"]["spec"].get("affinity")
    if not new or new == (old or {}).get(name):
        return []
    # Only this part of it may change.
    whole = {"op": "add", "path": path, "value": {name: new}}
    return [whole if old is None else {"op": "add", "path": f"{path}/{name}", "value": new}]


def _suspended(value: bool) -> JsonPatch:
    return [{"op": "add", "path": "/spec/suspend", "value": value}]


def _stopped(workload: Object) -> JsonPatch:
    """Suspended, and in a queue kept from being resumed under the old number: Kueue would do it within moments."""
    if queue_of(workload) is None:
        return _suspended(True)
    annotations = workload["metadata"].get("annotations")
    mark = {"op": "add", "path": STOPPING_PATH, "value": "true"}
    whole = {"op": "add", "path": "/metadata/annotations", "value": {ANNOTATION_STOPPING: "true"}}
    return [*_suspended(True), whole if annotations is None else mark]


def _released(workload: Object) -> JsonPatch:
    """From here on Kueue may resume it."""
    if ANNOTATION_STOPPING not in (workload["metadata"].get("annotations") or {}):
        return []
    return [{"op": "remove", "path": STOPPING_PATH}]


def _sized(workload: Object, nodes: int) -> JsonPatch:
    """So many pods; a Job's two numbers change together or not at all."""
    if workload_nodes(workload) == nodes:
        return []
    return [{"op": "add", "path": f"/spec/{field}", "value": nodes} for field in ("completions", "parallelism")]


def _told(workload: Object, nodes: int) -> JsonPatch:
    """What the next pods are told of their number; only a Job that sleeps lets that change."""
    return [] if told_nodes(workload) in (None, nodes) else [{"op": "add", "path": NODES_PATH, "value": str(nodes)}]


def _numbered(attempt: int) -> JsonPatch:
    """Applies to a suspended Job only: pods of two attempts must never meet."""
    return [
        {"op": "test", "path": "/spec/suspend", "value": True},
        {"op": "add", "path": ATTEMPT_PATH, "value": str(attempt)},
    ]


def _marked(workload: Object, attempt: int) -> JsonPatch:
    """A toleration that tolerates nothing, by which Kueue sees that the pods are others.

    When Kueue takes a Job back it makes the template again what its Workload says, annotations included. It brings the
    Workload of a Job that waits up to date only where resources or tolerations differ; tolerations are what may change.
    """
    known = workload["spec"]["template"]["spec"].get("tolerations") or []
    others = [item for item in known if item.get("key") != ANNOTATION_ATTEMPT]
    mark = {"key": ANNOTATION_ATTEMPT, "operator": "Equal", "value": str(attempt)}
    return [{"op": "add", "path": "/spec/template/spec/tolerations", "value": [*others, mark]}]
