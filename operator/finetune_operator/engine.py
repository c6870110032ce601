"""The running control plane over any cluster: queue, workers, progress poller and resync in one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from finetune_api.status import TERMINAL
from finetune_operator.cluster.port import FINE_TUNE_JOB, Cluster, ClusterError, Key, Kind, Object
from finetune_operator.cluster.rules import key_of
from finetune_operator.lifecycle.silence import SILENT_SECONDS
from finetune_operator.logs import about
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressPoller
from finetune_operator.queue import Backoff, KeyedQueue, Line, run_worker
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.watches import WATCHED, Watches

log = logging.getLogger(__name__)
RESYNC_RETRY_SECONDS = 10.0
"""After a LIST that failed; the watches go on meanwhile."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Engine:
    """Watches put keys; workers reconcile them.

    Args:
        clock: the present in UTC, for what is written into objects.
        monotonic: seconds, for delays.
        metrics: where durations and errors are counted.
        gate: set while this process may work; by default always. A replica that does not lead has it cleared.
        watches: what the watches have told, which each LIST is compared with.
        listed: set when every kind has been listed once.
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
        watches: Watches | None = None,
        listed: asyncio.Event | None = None,
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._metrics = metrics or Metrics(monotonic)
        self._monotonic = monotonic
        self._gate = gate or _open_gate()
        self._watches = watches or Watches(monotonic)
        self._news: dict[Key, float] = {}
        self._begun: dict[Key, float] = {}
        self._listed = listed or asyncio.Event()
        backoff = Backoff(settings.backoff_base_seconds, settings.backoff_max_seconds, random.Random())
        self.queue = KeyedQueue(backoff, monotonic)
        self._metrics.queue_depth.set_function(lambda: len(self.queue))
        self.poller = ProgressPoller(
            cluster,
            interval=settings.progress_poll_seconds,
            rate=settings.progress_reads_per_second,
            pace=settings.progress_write_seconds,
            patience=SILENT_SECONDS,
            changed=lambda key: self.put(key, Line.CALM),
            clock=monotonic,
        )
        self.reconciler = Reconciler(cluster, settings, clock, self.poller, wake=self.put, told=self)

    def put(self, key: Key, line: Line = Line.NEW) -> None:
        """Something happened to this job or to one of its children."""
        # One who does not lead collects nothing: the resync with which it begins to lead looks at every job.
        if self._gate.is_set():
            self._news.setdefault(key, self._monotonic())
            self.queue.put(key, line)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._resync_for_ever())
            await self._gate.wait()
            for _ in range(self._settings.workers):
                group.create_task(run_worker(self.queue, self._work))
            group.create_task(self.poller.run())

    async def drain(self) -> None:
        """Begin no pass any more, and finish those under way."""
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self.queue.close()
        except TimeoutError:
            log.warning("passes are still under way after %.0f s; they are cut off", self._settings.drain_seconds)

    async def resync(self, everything: bool = False) -> int:
        """LIST all jobs and look at those that have not ended. Returns how many are looked at.

        Raises ClusterError where a kind could not be listed; if it was not the jobs, they are looked at nevertheless.

        Args:
            everything: look at those that have ended as well.
        """
        found, keys = set(), []
        self._metrics.jobs.relist()
        async for raw in self._survey(FINE_TUNE_JOB):
            key = key_of(raw)
            found.add(key)
            if self._gate.is_set():
                self._metrics.jobs.listed(raw)
            if everything or _has_a_future(raw):
                keys.append(key)
        self._metrics.jobs.keep(found)
        self._look_at(keys, over=0.0 if everything else self._settings.resync_seconds / 2)
        # Only to see whether their watches live: where these fail, the jobs are looked at all the same.
        for kind in WATCHED[1:]:
            async for _ in self._survey(kind):
                pass
        return len(keys)

    def _look_at(self, keys: Sequence[Key], over: float) -> None:
        """Put them all, spread over so many seconds, and behind what really happens: there may be thousands."""
        if not self._gate.is_set():
            return
        for number, key in enumerate(keys):
            if over and number:
                self.queue.put_after(key, over * number / len(keys))
            else:
                self.queue.put(key, Line.CALM)

    async def _survey(self, kind: Kind) -> AsyncIterator[Object]:
        """LIST a kind, and compare with what its watch has told."""
        before, versions = self._watches.known(kind), []
        async for obj in self._cluster.walk(kind, metadata_only=kind != FINE_TUNE_JOB):
            metadata = obj["metadata"]
            versions.append({"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]})
            yield obj
        self._watches.compare(kind, before, versions)

    async def _work(self, key: Key) -> float | None:
        await self._gate.wait()
        self._begun[key] = self._news.pop(key, self._monotonic())
        try:
            with about(key), self._metrics.pass_seconds.time(), self._metrics.errors.count_exceptions():
                return await self.reconciler.reconcile(key)
        finally:
            del self._begun[key]

    def written(self, raw: Object, status: Object) -> None:
        """The reconciler has written a status."""
        key = key_of(raw)
        if key in self._begun:
            self._metrics.status_lag.observe(self._monotonic() - self._begun[key])
        self._metrics.written(raw, status)

    def gone(self, key: Key) -> None:
        """The reconciler has found that a job was deleted."""
        self._metrics.jobs.gone(key)

    async def _resync_for_ever(self) -> None:
        led = False
        while True:
            leads = self._gate.is_set()
            pause = self._settings.resync_seconds
            try:
                # The first look of one who leads is at everything: what has ended may have to be tidied up.
                await self.resync(everything=leads and not led)
                led = leads
                self._listed.set()
            except ClusterError as error:
                pause = min(pause, RESYNC_RETRY_SECONDS)
                log.warning("resync failed, again in %.0f s: %s", pause, error)
            await self._pause(pause, leads)

    async def _pause(self, seconds: float, leads: bool) -> None:
        """Shorter where this process begins to lead meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await (asyncio.Event() if leads else self._gate).wait()


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
