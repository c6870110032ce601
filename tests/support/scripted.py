"""A node without processes: pods end when the test says so. With a clock that only the test moves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from finetune_operator.cluster.jobs import JobController
from finetune_operator.cluster.kubelet import Exit, Kubelet, StartError
from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import Object
from finetune_operator.cluster.rules import timestamp

NO_ROOM = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."


class Clock:
    """The present, which stands still between two calls of `forward`."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class ScriptedRuntime:
    """Runs nothing. A pod that is asked to stop exits with `stop_code`, unless that is None: then it hangs."""

    def __init__(self, stop_code: int | None = 75) -> None:
        self.stop_code = stop_code
        self.started: list[str] = []
        self.stopped: dict[str, float] = {}
        self.refuse: StartError | None = None
        self.lost: set[str] = set()
        """Pods on nodes that are gone: nothing that happens to them is heard of any more, nor do they hear anything."""
        self._ends: dict[str, Exit] = {}

    def start(self, pod: Object) -> str:
        if self.refuse is not None:
            raise self.refuse
        self.started.append(pod["metadata"]["name"])
        return f"127.1.0.{len(self.started)}"

    def stop(self, pod: Object, grace_seconds: float) -> None:
        name = pod["metadata"]["name"]
        if name in self.lost:
            return
        self.stopped[name] = grace_seconds
        if grace_seconds == 0:
            self._ends.setdefault(name, Exit(137))
        elif self.stop_code is not None:
            self._ends.setdefault(name, Exit(self.stop_code))

    def poll(self, pod: Object) -> Exit | None:
        return self._ends.get(pod["metadata"]["name"])

    def end(self, name: str, code: int, message: str = "", reason: str = "") -> None:
        """The pod's container ends now, as the next look will find."""
        self._ends[name] = Exit(code, message, reason)


class Room(Kubelet):
    """A cluster with room for so many pods at a time; the others are told what a scheduler tells them."""

    room: int | None = None
    """None: no end of it."""

    def _start(self, pod: Object) -> None:
        if self.room is None or len(self._running) < self.room:
            super()._start(pod)
        elif not pod["status"].get("conditions"):
            unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NO_ROOM}
            since = timestamp(self._clock())
            self._report(pod, {"phase": "Pending", "conditions": [{**unplaced, "lastTransitionTime": since}]})


class Node:
    """The controllers on the server's side over one cluster: what a real cluster brings along."""

    def __init__(self, cluster: MemoryCluster, clock: Clock, runtime: ScriptedRuntime | None = None) -> None:
        self.runtime = runtime or ScriptedRuntime()
        self.jobs = JobController(cluster, clock=clock)
        self.kubelet = Room(cluster, self.runtime, clock=clock)
        self._changes = 0
        cluster.subscribe(self._count)

    def _count(self, change: object) -> None:
        self._changes += 1

    async def settle(self) -> float | None:
        """Look until nothing changes any more; returns the seconds until the Job controller has something to do."""
        while True:
            before = self._changes
            wait = await self.jobs.sync()
            await self.kubelet.sync()
            if self._changes == before:
                return wait
