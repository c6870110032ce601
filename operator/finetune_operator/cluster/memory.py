"""The part of a Kubernetes API server that the product relies on, in this process's memory.

`finetune run` keeps a user's jobs in it, with a file behind it, and the tests of the control plane run on it. It is
faithful where our code depends on the server: uids, resource versions, generations, admission, immutable fields,
the status subresource, JSON Patch tests, finalizers, graceful deletion of pods and collection of dependents.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from finetune_api.contract import Progress
from finetune_operator.cluster.port import (
    EVENT,
    FINE_TUNE_JOB,
    KINDS,
    POD,
    ConflictError,
    JsonPatch,
    Key,
    Kind,
    Object,
    Objects,
    labels_of_ours,
)
from finetune_operator.cluster.rules import (
    WITH_STATUS,
    check_preconditions,
    check_update,
    clone,
    described,
    key_of,
    merge,
    patched,
    selected,
    timestamp,
)
from finetune_operator.cluster.statefile import StateFile

Admission = Callable[[Object, Object | None], Object]
"""(new, old or None) -> the object with its defaults; raises InvalidError."""
ProgressReader = Callable[[Object], Awaitable[Progress | None]]
DEFAULT_GRACE_SECONDS = 30


@dataclass(frozen=True)
class Change:
    """What a watch delivers: the object as it is now, or as it last was."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    kind: Kind
    key: Key
    obj: Object


def admit_by_crd(obj: Object, old: Object | None) -> Object:
    """Schema, defaults and CEL of the CRD."""
    from finetune_operator.validation import admit  # heavy: the CEL engine

    return admit(obj, old)


def utc_now() -> datetime:
    return datetime.now(UTC)


async def _no_progress(pod: Object) -> Progress | None:
    return None


class MemoryCluster:
    """An implementation of the Cluster port. Not thread-safe: everything happens in one event loop.

    Args:
        clock: the present in UTC.
        new_uid: the next uid.
        admit: admission of FineTuneJobs.
        read_progress: how a pod's progress is read; by default no pod answers.
        state: where the objects are kept; by default nowhere.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = utc_now,
        new_uid: Callable[[], str] = lambda: str(uuid.uuid4()),
        admit: Admission = admit_by_crd,
        read_progress: ProgressReader = _no_progress,
        state: StateFile | None = None,
    ) -> None:
        self._clock = clock
        self._new_uid = new_uid
        self._admit = admit
        self._read_progress = read_progress
        self._state = state
        self._subscribers: list[Callable[[Change], None]] = []
        loaded = state.load() if state else {}
        self._version: int = loaded.get("version", 0)
        self._objects: dict[str, dict[Key, Object]] = {kind: {} for kind in KINDS}
        for obj in loaded.get("objects", []):
            self._objects[obj["kind"]][key_of(obj)] = obj

    def subscribe(self, callback: Callable[[Change], None]) -> None:
        """Call back after every change, at once and in order; the callback must neither block nor raise."""
        self._subscribers.append(callback)

    # --- the port ----------------------------------------------------------------------------------------------------

    async def read(self, kind: Kind, key: Key) -> Object | None:
        return self.get(kind, key)

    async def list(self, kind: Kind, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        objects = self._objects[kind.kind].items()
        return [clone(obj) for key, obj in objects if namespace in (None, key.namespace) and selected(obj, labels)]

    async def walk(self, kind: Kind, *, metadata_only: bool = False) -> AsyncIterator[Object]:
        for obj in await self.list(kind, None, labels_of_ours(kind)):
            yield obj

    async def create(self, obj: Object) -> Object:
        kind, key = KINDS[obj["kind"]], key_of(obj)
        if key in self._objects[kind.kind]:
            raise ConflictError(f"{described(obj)} already exists in namespace {key.namespace}")
        new = self._admitted(clone(obj), None)
        new["metadata"] = {**new["metadata"], **self._birth(kind, key)}
        if kind.kind in WITH_STATUS:
            new.pop("status", None)
        if kind is POD:
            new["status"] = {"phase": "Pending"}
        self._store("ADDED", new)
        if self._is_orphan(new):
            self._remove_gracefully(new, None)
        return _copy(new)

    async def apply(self, obj: Object) -> Object:
        current = self._objects[obj["kind"]].get(key_of(obj))
        if current is None:
            if obj["metadata"].get("uid"):
                raise ConflictError(f"{described(obj)} is gone; it is not made anew")
            return await self.create(obj)
        check_preconditions(current, obj["metadata"])
        return self._update(current, merge(current, {**obj, "status": current.get("status")}))

    async def patch(self, kind: Kind, key: Key, patch: JsonPatch, subresource: str | None = None) -> Object | None:
        current = self._objects[kind.kind].get(key)
        if current is None:
            return None
        wanted = patched(current, patch)
        check_preconditions(current, wanted["metadata"])
        if subresource is None:
            return self._update(current, wanted)
        return self._update(current, {**current, subresource: wanted.get(subresource)}, subresource)

    async def delete(self, kind: Kind, key: Key, uid: str, grace_seconds: int | None = None) -> None:
        current = self._objects[kind.kind].get(key)
        if current is not None and current["metadata"]["uid"] == uid:
            self._remove_gracefully(current, grace_seconds)

    async def emit(self, regarding: Object, reason: str, message: str, warning: bool = False) -> None:
        key, now = key_of(regarding), timestamp(self._clock())
        kind = "Warning" if warning else "Normal"
        uid = regarding["metadata"].get("uid", "")
        digest = hashlib.sha256("\0".join((uid, reason, message, kind)).encode()).hexdigest()[:16]
        event_key = Key(key.namespace, f"{key.name}.{digest}")
        earlier = self._objects["Event"].get(event_key)
        if earlier is not None:
            self._update(earlier, {**earlier, "count": earlier["count"] + 1, "lastTimestamp": now})
            return
        involved = {"apiVersion": regarding["apiVersion"], "kind": regarding["kind"], "name": key.name, "uid": uid}
        await self.create({
            "apiVersion": EVENT.api_version, "kind": EVENT.kind,
            "metadata": {"name": event_key.name, "namespace": key.namespace},
            "involvedObject": {**involved, "namespace": key.namespace},
            "reason": reason, "message": message, "type": kind, "count": 1,
            "firstTimestamp": now, "lastTimestamp": now,
        })  # fmt: skip

    async def events_of(self, obj: Object) -> Objects:
        events = await self.list(EVENT, key_of(obj).namespace, {})
        mine = [event for event in events if event["involvedObject"].get("uid") == obj["metadata"]["uid"]]
        return sorted(mine, key=lambda event: str(event["lastTimestamp"]))

    async def read_progress(self, pod: Object) -> Progress | None:
        return await self._read_progress(pod)

    # --- for the controllers on the server's side --------------------------------------------------------------------

    def get(self, kind: Kind, key: Key) -> Object | None:
        """As `read`, without a wait."""
        found: Object | None = clone(self._objects[kind.kind].get(key))
        return found

    def set_status(self, kind: Kind, key: Key, status: Object) -> None:
        """Replace the status of an object, as kubelet and Job controller do; nothing happens when it is gone."""
        current = self._objects[kind.kind].get(key)
        if current is not None:
            self._update(current, {**current, "status": status}, "status")

    def bind(self, key: Key, node: str) -> None:
        """Give a pod to a node: from now on it goes away only when that node has stopped it."""
        pod = self._objects[POD.kind][key]
        self._update(pod, {**pod, "spec": {**pod["spec"], "nodeName": node}})

    def release(self, key: Key, finalizer: str) -> None:
        """Take a finalizer off a pod; one that waited only for that is gone then."""
        pod = self._objects[POD.kind].get(key)
        if pod is not None:
            left = [item for item in pod["metadata"].get("finalizers", []) if item != finalizer]
            self._update(pod, {**pod, "metadata": {**pod["metadata"], "finalizers": left}})

    # --- how objects come and go -------------------------------------------------------------------------------------

    def _admitted(self, obj: Object, old: Object | None) -> Object:
        return self._admit(obj, old) if obj["kind"] == FINE_TUNE_JOB.kind else obj

    def _birth(self, kind: Kind, key: Key) -> dict[str, Any]:
        born: dict[str, Any] = {"namespace": key.namespace, "uid": self._new_uid()}
        born["creationTimestamp"] = timestamp(self._clock())
        return {**born, "generation": 1} if kind.kind in WITH_STATUS else born

    def _update(self, current: Object, wanted: Object, subresource: str | None = None) -> Object:
        """Store what the writer may change; without a difference nothing happens, not even a new version."""
        new = clone(wanted)
        self._keep_what_is_the_servers(current, new, subresource)
        if subresource is None and new != current:
            new = self._admitted(new, clone(current))
            check_update(current, new)
        if new == current:
            return _copy(current)
        if new.get("spec") != current.get("spec") and "generation" in new["metadata"]:
            new["metadata"]["generation"] += 1
        self._store("MODIFIED", new)
        self._finalize(new)
        return _copy(new)

    def _keep_what_is_the_servers(self, current: Object, new: Object, subresource: str | None) -> None:
        for field in ("uid", "resourceVersion", "creationTimestamp", "generation", "deletionTimestamp"):
            if field in current["metadata"]:
                new["metadata"][field] = current["metadata"][field]
        if subresource is None and current["kind"] in WITH_STATUS:
            new["status"] = clone(current.get("status"))
        if new.get("status") is None:
            new.pop("status", None)

    def _store(self, change: Literal["ADDED", "MODIFIED"], obj: Object) -> None:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        self._objects[obj["kind"]][key_of(obj)] = obj
        self._announce(change, obj)

    def _announce(self, change: Literal["ADDED", "MODIFIED", "DELETED"], obj: Object) -> None:
        self._save()
        for callback in self._subscribers:
            callback(Change(change, KINDS[obj["kind"]], key_of(obj), clone(obj)))

    def _save(self) -> None:
        if self._state is not None:
            objects = [obj for of_kind in self._objects.values() for obj in of_kind.values()]
            self._state.save({"version": self._version, "objects": objects})

    def _remove_gracefully(self, obj: Object, grace_seconds: int | None) -> None:
        """Pods end first; everything else is gone at once."""
        if obj["kind"] != POD.kind:
            self._drop(obj)
            return
        grace = grace_seconds
        if grace is None:
            grace = obj["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        marks = {"deletionTimestamp": self._due(obj["metadata"], grace), "deletionGracePeriodSeconds": grace}
        doomed = {**clone(obj), "metadata": {**clone(obj["metadata"]), **marks}}
        self._store("MODIFIED", doomed)
        self._finalize(doomed)

    def _due(self, metadata: Object, grace: int) -> str:
        """When the deletion is due: counted from the first request, which later ones may only hasten."""
        requested = self._clock()
        if "deletionTimestamp" in metadata:
            earlier = timedelta(seconds=metadata["deletionGracePeriodSeconds"])
            requested = datetime.fromisoformat(metadata["deletionTimestamp"]) - earlier
        return timestamp(requested + timedelta(seconds=grace))

    def _finalize(self, obj: Object) -> None:
        """Drop a deleted pod when its finalizers are gone and no process can be left of it, or nobody waits for it."""
        metadata = obj["metadata"]
        if obj["kind"] != POD.kind or "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return
        ended = obj["status"]["phase"] in ("Succeeded", "Failed") or "nodeName" not in obj["spec"]
        if ended or metadata["deletionGracePeriodSeconds"] == 0:
            self._drop(obj)

    def _drop(self, obj: Object) -> None:
        del self._objects[obj["kind"]][key_of(obj)]
        self._announce("DELETED", obj)
        uid = obj["metadata"]["uid"]
        dependents = [other for kind in self._objects.values() for other in kind.values() if _is_owned_by(other, uid)]
        for dependent in dependents:
            if self._is_orphan(dependent):
                self._remove_gracefully(dependent, None)

    def _is_orphan(self, obj: Object) -> bool:
        """Whether it has owners and none of them exists: that is what the garbage collector looks for."""
        owners = obj["metadata"].get("ownerReferences", [])
        return bool(owners) and not any(self._exists(obj, owner) for owner in owners)

    def _exists(self, obj: Object, owner: Mapping[str, Any]) -> bool:
        found = self._objects.get(owner["kind"], {}).get(Key(key_of(obj).namespace, owner["name"]))
        return found is not None and found["metadata"]["uid"] == owner["uid"]


def _is_owned_by(obj: Object, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in obj["metadata"].get("ownerReferences", []))


def _copy(obj: Object) -> Object:
    copy: Object = clone(obj)
    return copy
