"""The port between the control plane and whatever runs pods: Kubernetes, this machine, or memory in tests.

It is shaped like the Kubernetes API, since that is the contract the product is written against: objects are plain
dicts as the API server returns them, with metadata.uid and metadata.resourceVersion.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.contract import LABEL_JOB, Progress

Object = dict[str, Any]
"""A Kubernetes object as JSON."""
Objects = list[Object]
JsonPatch = list[dict[str, Any]]
"""RFC 6902."""


@dataclass(frozen=True, order=True)
class Key:
    """Namespace and name of an object; the queue's unit of work."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Kind:
    """A kind of object, as the API addresses it."""

    api_version: str
    kind: str
    plural: str


FINE_TUNE_JOB = Kind("finetune.dev/v1alpha1", "FineTuneJob", "finetunejobs")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SERVICE = Kind("v1", "Service", "services")
POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")
JOB = Kind("batch/v1", "Job", "jobs")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
TRACKING = "batch.kubernetes.io/job-tracking"
"""Finalizer by which the Job controller holds a pod until it has counted it."""
KINDS = {kind.kind: kind for kind in (FINE_TUNE_JOB, CONFIG_MAP, SERVICE, POD, EVENT, JOB, NETWORK_POLICY, LEASE)}


def labels_of_ours(kind: Kind) -> dict[str, str]:
    """What selects the objects of a kind that are the operator's matter: all FineTuneJobs, and their children."""
    return {} if kind == FINE_TUNE_JOB else {LABEL_JOB: ""}


class ClusterError(Exception):
    """The API refused or could not be reached; the reconcile is tried again later."""


class ConflictError(ClusterError):
    """409, or a JSON Patch whose test failed: the object is another one, or has moved on."""


class InvalidError(ClusterError):
    """422 or 400: the API server does not accept the object; trying again does not help, its message does."""


class ForbiddenError(ClusterError):
    """403: quota, admission or a missing permission."""


class Cluster(Protocol):
    """What the control plane may do to the world. Every method raises ClusterError; absence is not an error."""

    async def read(self, kind: Kind, key: Key) -> Object | None:
        """The object as it is now (a live read, no cache), or None."""
        ...

    async def list(self, kind: Kind, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        """All objects with these labels, in one namespace or, with None, in all that are watched.

        A label's value "" selects objects that have the label, whatever its value.
        """
        ...

    def walk(self, kind: Kind, *, metadata_only: bool = False) -> AsyncIterator[Object]:
        """All objects of a kind that are the operator's matter, in all watched namespaces, as of one moment.

        A page at a time is held in memory: five thousand jobs are some 100 MB at once. With metadata_only the rest of
        an object may be left out.
        """
        ...

    async def create(self, obj: Object) -> Object:
        """Create; ConflictError when the name is taken."""
        ...

    async def apply(self, obj: Object) -> Object:
        """Server-side apply with the operator as field owner; creates what is absent. With metadata.uid set, only that
        incarnation is updated and an absent one is not re-created (ConflictError)."""
        ...

    async def patch(self, kind: Kind, key: Key, patch: JsonPatch, subresource: str | None = None) -> Object | None:
        """JSON Patch; None when the object is gone. A failed `test` is a ConflictError."""
        ...

    async def delete(self, kind: Kind, key: Key, uid: str, grace_seconds: int | None = None) -> None:
        """Delete this incarnation, its dependents in the background; what is gone, or another one, is left alone."""
        ...

    async def emit(self, regarding: Object, reason: str, message: str, warning: bool = False) -> None:
        """Write an event about an object; equal ones in a row are counted, not repeated. Best effort."""
        ...

    async def events_of(self, obj: Object) -> Objects:
        """The events about this incarnation of an object, oldest first: some refusals show nowhere else."""
        ...

    async def read_progress(self, pod: Object) -> Progress | None:
        """GET /progress of a trainer pod, bounded in time (2 s) and size; None when it does not answer."""
        ...
