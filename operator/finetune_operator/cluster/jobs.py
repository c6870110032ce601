"""The Job controller for the in-memory API server: applies what `job_rules` decides."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import datetime

from finetune_operator.cluster.job_rules import look_at, pod_of
from finetune_operator.cluster.memory import MemoryCluster, utc_now
from finetune_operator.cluster.pods import is_owned_by
from finetune_operator.cluster.port import JOB, POD, TRACKING, ConflictError, Object
from finetune_operator.cluster.rules import key_of


class JobController:
    """Brings pods and status of all Jobs up to date, whenever `sync` is called.

    Args:
        back_off_seconds: pause after the first failure of an index; doubled by each further one, 600 at most.
        suffix: the random end of a pod's name.
    """

    def __init__(
        self,
        cluster: MemoryCluster,
        *,
        clock: Callable[[], datetime] = utc_now,
        back_off_seconds: float = 10.0,
        suffix: Callable[[], str] = lambda: secrets.token_hex(3)[:5],
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._back_off = back_off_seconds
        self._suffix = suffix

    async def sync(self) -> float | None:
        """Look at every Job once; returns the seconds until something is due without any change, or None."""
        pods = await self._cluster.list(POD, None, {})
        jobs = await self._cluster.list(JOB, None, {})
        self._release_orphans(pods, jobs)
        waits = [await self._sync_job(job, [pod for pod in pods if is_owned_by(pod, job)]) for job in jobs]
        return min((wait for wait in waits if wait is not None), default=None)

    async def _sync_job(self, job: Object, pods: Sequence[Object]) -> float | None:
        step = look_at(job, pods, self._clock(), self._back_off)
        for index, failures in step.create.items():
            await self._create(job, index, failures)
        self._cluster.set_status(JOB, key_of(job), step.status)
        for pod in step.release:
            self._cluster.release(key_of(pod), TRACKING)
        for pod in step.delete:
            await self._cluster.delete(POD, key_of(pod), pod["metadata"]["uid"])
        return step.wait

    async def _create(self, job: Object, index: int, failures: int) -> None:
        try:
            await self._cluster.create(pod_of(job, index, failures, self._suffix()))
        except ConflictError:  # two equal suffixes; the next look tries another
            return

    def _release_orphans(self, pods: Sequence[Object], jobs: Sequence[Object]) -> None:
        for pod in pods:
            tracked = TRACKING in pod["metadata"].get("finalizers", [])
            if tracked and not any(is_owned_by(pod, job) for job in jobs):
                self._cluster.release(key_of(pod), TRACKING)
