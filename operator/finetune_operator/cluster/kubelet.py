"""A node for the in-memory API server: starts pods, stops those that are deleted, and reports how they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from finetune_operator.cluster.memory import MemoryCluster, utc_now
from finetune_operator.cluster.pods import ended, ended_status, lost_status, running_status, waiting_status
from finetune_operator.cluster.port import POD, Object
from finetune_operator.cluster.rules import key_of


@dataclass(frozen=True)
class Exit:
    """How a pod's container ended."""

    code: int
    message: str = ""
    """What it left in its termination message."""
    reason: str = ""
    """`OOMKilled` where the kernel did it; else empty."""


class StartError(Exception):
    """The container cannot be started; the reason is one that a kubelet would write, such as CreateContainerError."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class PodRuntime(Protocol):
    """Runs pods. None of its methods blocks."""

    def start(self, pod: Object) -> str:
        """Start the pod's container and return the pod's address; raises StartError."""
        ...

    def stop(self, pod: Object, grace_seconds: float) -> None:
        """Ask it to end, and force it after the grace period; 0 forces it now. Later calls may shorten the time."""
        ...

    def poll(self, pod: Object) -> Exit | None:
        """How it ended, or None while it runs."""
        ...


class Kubelet:
    """Brings processes and pod statuses together, whenever `sync` is called."""

    def __init__(
        self,
        cluster: MemoryCluster,
        runtime: PodRuntime,
        *,
        clock: Callable[[], datetime] = utc_now,
        node: str = "this-machine",
    ) -> None:
        self._cluster = cluster
        self._runtime = runtime
        self._clock = clock
        self._node = node
        self._running: dict[str, Object] = {}
        self._refused: set[str] = set()
        self._stopping: dict[str, float] = {}

    @property
    def busy(self) -> bool:
        """Whether any pod runs."""
        return bool(self._running)

    async def sync(self) -> None:
        """Look at every pod once."""
        pods = await self._cluster.list(POD, None, {})
        self._kill_what_was_removed({pod["metadata"]["uid"] for pod in pods})
        for pod in pods:
            if not ended(pod):
                self._sync_pod(pod)

    def _sync_pod(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid in self._running:
            self._watch_over(pod)
        elif "deletionTimestamp" in pod["metadata"]:
            self._report(pod, ended_status(pod, 137, "Error", "deleted before it had started", self._clock()))
        elif "nodeName" not in pod["spec"]:
            self._start(pod)
        elif uid not in self._refused:
            # Its process died with the program that ran it: as if a node had lost power.
            self._report(pod, lost_status(pod, "the program that ran this pod is gone", self._clock()))

    def _start(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        self._cluster.bind(key_of(pod), self._node)
        try:
            address = self._runtime.start(pod)
        except StartError as error:
            self._refused.add(uid)
            self._report(pod, waiting_status(pod, error.reason, error.message, self._clock()))
            return
        self._running[uid] = pod
        self._report(pod, running_status(pod, address, self._clock()))

    def _watch_over(self, pod: Object) -> None:
        uid, metadata = pod["metadata"]["uid"], pod["metadata"]
        end = self._runtime.poll(pod)
        if end is not None:
            del self._running[uid]
            reason = end.reason or ("Error" if end.code else "Completed")
            self._report(pod, ended_status(pod, end.code, reason, end.message, self._clock()))
        elif "deletionTimestamp" in metadata:
            grace = float(metadata["deletionGracePeriodSeconds"])
            if grace < self._stopping.get(uid, float("inf")):
                self._stopping[uid] = grace
                self._runtime.stop(pod, grace)

    def _kill_what_was_removed(self, present: set[str]) -> None:
        """A pod that was deleted by force is gone from the server while its process still runs."""
        for uid in self._running.keys() - present:
            pod = self._running[uid]
            self._runtime.stop(pod, 0)
            if self._runtime.poll(pod) is not None:
                del self._running[uid]

    def _report(self, pod: Object, status: Object) -> None:
        self._cluster.set_status(POD, key_of(pod), status)
