"""What the operator keeps in memory for each live job: thousands of them have to fit."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from pathlib import Path

import pytest

from finetune_api.contract import LABEL_JOB, Progress, Stage
from finetune_operator.cluster.echoes import Echoes
from finetune_operator.cluster.port import JOB, LEASE, POD, Key, Object
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressPoller
from finetune_operator.queue import Backoff, KeyedQueue
from finetune_operator.watches import WATCHED, Watches
from tests.operator.test_process import LEASE_KEY, Cluster, Operator
from tests.operator.world import manifest

JOBS = 1000
PADDING = [{"name": f"VARIABLE_{number}", "value": "x" * 40} for number in range(100)]
KEPT_BYTES = 6 * 1024
"""By our own indices, for each job with its Job and its pod. Measured: 2.9 KiB."""
KEPT_BY_WATCHES = 5 * 1024
"""Of the process, for each job with its Job and its pod, kopf's records included. Measured: 1.5 KiB; whole: 9.6."""


class Answers:
    async def read_progress(self, pod: Object) -> Progress:
        return Progress(stage=Stage.TRAINING, step=7, total_steps=100, loss=2.0)


async def test_a_live_job_costs_a_few_kib_of_our_own_indices() -> None:
    watches, echoes, metrics = Watches(lambda: 0.0), Echoes(), Metrics()
    queue = KeyedQueue(Backoff(1, 1, random.Random(0)), lambda: 0.0)
    poller = ProgressPoller(
        Answers(),  # type: ignore[arg-type]
        interval=10,
        rate=1e9,
        pace=30,
        patience=120,
        changed=queue.put,
        clock=lambda: 0.0,
    )
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(JOBS):
            raw, key = manifest(f"job-{number}"), Key("".join(("m", "l")), f"job-{number}")
            for kind in WATCHED:
                metadata = {"uid": f"{kind.kind}-{number:036}", "resourceVersion": str(10**9 + number)}
                watches.delivered(kind, metadata, deleted=False)
                echoes.wrote(kind, {"metadata": metadata})
            metrics.jobs.see({**raw, "status": {"phase": "Running"}})
            poller.latest(key, {"metadata": {"name": f"p-{number}", "uid": f"{number:036}"}, "spec": "x" * 40000})
            queue.put_after(key, 30.0)
        await poller.poll_due()
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept / JOBS < KEPT_BYTES


@pytest.mark.slow
async def test_the_watches_of_a_process_keep_little_of_each_object(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    # One that does not lead has the same watches, and nothing else to do.
    values: Object = {"settings": {"leaseSeconds": 600}}
    async with cluster.serving():
        await cluster.world.cluster.create(_held_lease())
        empty = await cluster.start("empty", values)
        await cluster.until(lambda: _is_up_to_date(empty), play=False)
        for number in range(JOBS):
            for obj in _objects(number):
                await cluster.world.cluster.create(obj)
        full = await cluster.start("full", values)
        await cluster.until(lambda: _is_up_to_date(full), play=False)
        kept = (_resident(full.process.pid) - _resident(empty.process.pid)) / JOBS
    assert kept < KEPT_BY_WATCHES


def _held_lease() -> Object:
    spec = {"holderIdentity": "another", "leaseDurationSeconds": 600, "leaseTransitions": 0}
    metadata = {"name": LEASE_KEY.name, "namespace": LEASE_KEY.namespace}
    return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}


def _objects(number: int) -> tuple[Object, Object, Object]:
    """A job with its Job and its pod, as large as they are."""
    name = f"job-{number}"
    metadata = {"name": name, "namespace": "ml", "labels": {LABEL_JOB: name}}
    pod = {"containers": [{"name": "trainer", "image": "x", "env": PADDING}]}
    return (
        manifest(name),
        {"apiVersion": JOB.api_version, "kind": JOB.kind, "metadata": metadata, "spec": {"template": {"spec": pod}}},
        {"apiVersion": POD.api_version, "kind": POD.kind, "metadata": metadata, "spec": pod},
    )


async def _is_up_to_date(operator: Operator) -> bool:
    """Whether it has listed everything, and its watches have told of everything that is there."""
    if (await asyncio.to_thread(operator.get, "/readyz"))[0] != 200:
        return False
    _, text = await asyncio.to_thread(operator.get, "/metrics")
    lags = [line for line in text.splitlines() if line.startswith("finetune_operator_watch_lag_seconds")]
    return all(line.endswith(" 0.0") for line in lags)


def _resident(process: int) -> int:
    """Bytes."""
    text = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) * 1024
