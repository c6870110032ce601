"""What Kueue does to Jobs, as far as they can tell: it suspends and resumes them, and says why in events."""

from __future__ import annotations

from finetune_api.contract import LABEL_QUEUE
from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import JOB, Object
from finetune_operator.cluster.rules import key_of


class Kueue:
    """One queue with room for `room` Jobs. A Job that is admitted and found suspended is resumed at once."""

    def __init__(self, cluster: MemoryCluster, room: int = 1) -> None:
        self.room = room
        self._cluster = cluster
        self._admitted: set[str] = set()

    async def sync(self) -> None:
        """Look at every Job once, in the order of their names."""
        jobs = await self._cluster.list(JOB, None, {LABEL_QUEUE: ""})
        self._admitted &= {job["metadata"]["uid"] for job in jobs}
        for job in jobs:
            uid = job["metadata"]["uid"]
            if len(self._admitted) < self.room:
                self._admitted.add(uid)
            if uid in self._admitted and job["spec"]["suspend"]:
                await self._suspend(job, False)

    async def preempt(self, job: Object, why: str) -> None:
        """Take a Job's place for somebody else."""
        self._admitted.discard(job["metadata"]["uid"])
        self.room -= 1
        await self._suspend(job, True)
        await self._cluster.emit(job, "Stopped", why)

    async def _suspend(self, job: Object, value: bool) -> None:
        await self._cluster.patch(JOB, key_of(job), [{"op": "replace", "path": "/spec/suspend", "value": value}])
