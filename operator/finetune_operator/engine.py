"""The running control plane over any cluster: queue, workers, progress poller and resync in one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime

from finetune_api.status import TERMINAL
from finetune_operator.cluster.port import FINE_TUNE_JOB, Cluster, ClusterError, Key, Object
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressPoller
from finetune_operator.queue import Backoff, KeyedQueue, run_worker
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Engine:
    """Watches put keys; workers reconcile them.

    Args:
        clock: the present in UTC, for what is written into objects.
        monotonic: seconds, for delays.
        metrics: where durations and errors are counted.
        gate: set while this process may work; by default always. A replica that does not lead has it cleared.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        *,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
        gate: asyncio.Event | None = None,
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._gate = gate or _open_gate()
        backoff = Backoff(settings.backoff_base_seconds, settings.backoff_max_seconds, random.Random())
        self.queue = KeyedQueue(backoff, monotonic)
        self._metrics.queue_depth.set_function(lambda: len(self.queue))
        self.poller = ProgressPoller(
            cluster,
            interval=settings.progress_poll_seconds,
            rate=settings.progress_reads_per_second,
            changed=self.put,
            clock=monotonic,
        )
        self.reconciler = Reconciler(cluster, settings, clock, self.poller, wake=self.put)

    def put(self, key: Key) -> None:
        """Something happened to this job or to one of its children."""
        self.queue.put(key)

    async def run(self) -> None:
        """Until cancelled."""
        await self._gate.wait()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.workers):
                group.create_task(run_worker(self.queue, self._work))
            group.create_task(self.poller.run())
            group.create_task(self._resync_for_ever())

    async def resync(self) -> int:
        """LIST all jobs and look at those that have not ended. Returns how many there are."""
        jobs = await self._cluster.list(FINE_TUNE_JOB, None, {})
        self._metrics.count_phases(map(_phase, jobs))
        unfinished = [Key(raw["metadata"]["namespace"], raw["metadata"]["name"]) for raw in jobs if _has_a_future(raw)]
        for key in unfinished:
            self.put(key)
        return len(unfinished)

    async def _work(self, key: Key) -> float | None:
        await self._gate.wait()
        with self._metrics.pass_seconds.time(), self._metrics.errors.count_exceptions():
            return await self.reconciler.reconcile(key)

    async def _resync_for_ever(self) -> None:
        while True:
            try:
                await self.resync()
            except ClusterError as error:
                log.warning("resync failed, again in %.0f s: %s", self._settings.resync_seconds, error)
            await asyncio.sleep(self._settings.resync_seconds)


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


def _has_a_future(raw: Object) -> bool:
    """Whether something can happen to it by itself: it has not ended, or is to be deleted some time after."""
    policy = raw["spec"].get("runPolicy") or {}
    return _phase(raw) not in TERMINAL or policy.get("ttlSecondsAfterFinished") is not None


def _phase(raw: dict[str, object]) -> str:
    status = raw.get("status")
    return str(status.get("phase") or "") if isinstance(status, dict) else ""
