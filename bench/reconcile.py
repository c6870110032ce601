"""What a job costs the control plane: API writes from creation to success, and the operator's CPU time.

200 jobs go at once through the real queue, workers and reconcile over the in-memory cluster, each with a start, two
progress reports and a result. The CPU time of the emulated cluster itself is measured apart and taken off, so that what
is left is the operator's: decisions, manifests, status. JSON and TLS of a real API server's client come on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from tests.operator.world import RESULT, World, admit_all, manifest

from bench.common import report
from finetune_api.contract import Progress, Stage
from finetune_operator.cluster.memory import Change, MemoryCluster
from finetune_operator.cluster.port import FINE_TUNE_JOB, Key
from finetune_operator.settings import Settings

JOBS = 200
SECONDS = 120.0
WRITES = ("create", "apply", "patch", "delete", "emit")


class Meter:
    """Passes calls on; counts writes and the CPU seconds that the cluster takes for itself."""

    def __init__(self, inner: MemoryCluster) -> None:
        self._inner = inner
        self.writes = 0
        self.reads = 0
        self.seconds = 0.0

    def walk(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner.walk(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.writes += name in WRITES
            self.reads += name not in WRITES
            begin = time.process_time()
            try:
                return await method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begin

        return call


class Run:
    """One operator over one cluster with JOBS jobs."""

    def __init__(self) -> None:
        # The pace of progress reads is no matter here: it would only make the run longer.
        self.world = World(Settings(progress_reads_per_second=1e6), admit=admit_all)
        self.meter = Meter(self.world.cluster)
        self.engine = self.world.operator(self.meter)  # type: ignore[arg-type]
        self.keys = [Key("ml", f"job-{number}") for number in range(JOBS)]
        self.outside = 0.0
        self._news = asyncio.Event()
        self.world.cluster.subscribe(self._changed)

    def _changed(self, change: Change) -> None:
        self._news.set()
        metadata = change.obj["metadata"]
        job = (metadata.get("labels") or {}).get("finetune.dev/job")
        if change.kind is FINE_TUNE_JOB or job:
            self.engine.put(Key(metadata["namespace"], job or metadata["name"]))

    async def create(self) -> None:
        for key in self.keys:
            await self.world.cluster.create(manifest(key.name))

    async def until(self, true: Callable[[dict[str, Any]], bool]) -> None:
        """Play the other controllers until every job's status is so."""
        async with asyncio.timeout(SECONDS):
            while not await self._all(true):
                await self._news.wait()
                self._news.clear()

    async def _all(self, true: Callable[[dict[str, Any]], bool]) -> bool:
        begin = time.process_time()
        await self.world.node.settle()
        jobs = await self.world.cluster.list(FINE_TUNE_JOB, None, {})
        self.outside += time.process_time() - begin
        return all(true(job.get("status") or {}) for job in jobs)

    async def progress(self, step: int) -> None:
        """Every trainer is at this step, and the operator has seen it."""
        self.world.clock.forward(40)
        self.world.progress = Progress(stage=Stage.TRAINING, step=step, total_steps=40, loss=2.0)
        await self.until(lambda status: (status.get("progress") or {}).get("step") == step)


async def measure() -> None:
    run = Run()
    task = asyncio.create_task(run.engine.run())
    await run.create()
    meter_at_start, begin = run.meter.seconds, time.process_time()
    run.outside = 0.0
    await run.until(lambda status: status.get("phase") == "Running")
    await run.progress(20)
    await run.world.end(0, json.dumps(RESULT))
    await run.until(lambda status: status.get("phase") == "Succeeded")
    total = time.process_time() - begin
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    operator = total - run.outside - (run.meter.seconds - meter_at_start)
    report(
        "reconcile",
        jobs=JOBS,
        writes_per_job=run.meter.writes / JOBS,
        reads_per_job=run.meter.reads / JOBS,
        operator_cpu_ms_per_job=1000 * operator / JOBS,
        limit_writes_per_job=8,
    )


def main() -> None:
    asyncio.run(measure())


if __name__ == "__main__":
    main()
