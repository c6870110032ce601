"""The operator with thousands of jobs on a real API server: `KUBECONFIG=... python -m bench.scale [JOBS [running]]`.

The server behind KUBECONFIG may be an API server and etcd alone; best it is thrown away afterwards. This process plays
the users, who create the jobs, and Job controller and kubelet, who make pods and let them run and end. Measured are

- from the first job to the last first status, beside a plain loop that makes the same API writes (FineTuneJob,
  ConfigMap, Service, NetworkPolicy, Job, status) with the same client and concurrency, from finished manifests;
- from a pod's change to the status that tells of it: when pods begin to run at a steady rate, and when the rest do at
  once, as fast as the server takes it;
- API requests per job until success, the operator's memory, and its CPU time until the first statuses and while all
  jobs run and report the same;
- from SIGKILL of the leader to the next status that its successor writes.

With `running` it ends when all jobs run, with the operator's memory: the rest takes as long again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable

from tests.chart.rendering import environment
from tests.e2e.cluster import install_crd

from bench.cluster import PATIENCE, Operator, Pods, answering_pods, each, namespace, statuses, until
from bench.common import report
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.kubernetes import KubernetesCluster, connect, load_configuration
from finetune_operator.cluster.port import FINE_TUNE_JOB, Key, Object
from finetune_operator.plan import plan
from finetune_operator.settings import load

IDLE_SECONDS = 30.0
STEADY_PODS = 300
STEADY_RATE = 10.0
"""Of pods that begin to run one after the other, and how many a second do."""
LOOP_MOST = 1000
"""Jobs with which the plain loop is run; with more it would only take longer."""


def job(namespace: str, name: str) -> Object:
    return {
        "apiVersion": FINE_TUNE_JOB.api_version,
        "kind": FINE_TUNE_JOB.kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": "s3://models/m"},
            "dataset": {"uri": "s3://data/d.jsonl"},
            "strategy": {"type": "LoRA"},
            "output": {"uri": f"s3://out/{name}"},
            "scheduling": {"schedulerName": "nobody"},
        },
    }


# --- the plain loop --------------------------------------------------------------------------------------------------


async def plain_loop(cluster: KubernetesCluster, names: list[str], status: Object) -> float:
    """Seconds for the same writes without an operator."""
    with namespace() as where:
        # Rendered once: what the operator thinks before it writes is what it is measured for.
        settings = load([], environment({"watch": {"namespaces": [where]}}))
        manifests = plan(FineTuneJob.from_wire(job(where, "NAME") | {"status": {}}), settings).all()
        text = json.dumps(manifests)

        async def write(name: str) -> None:
            created = await cluster.create(job(where, name))
            uid = created["metadata"]["uid"]
            for manifest in json.loads(text.replace("NAME", name)):
                manifest["metadata"]["ownerReferences"][0]["uid"] = uid
                await cluster.create(manifest)
            version = created["metadata"]["resourceVersion"]
            patch = [
                {"op": "test", "path": "/metadata/resourceVersion", "value": version},
                {"op": "add", "path": "/status", "value": status},
            ]
            await cluster.patch(FINE_TUNE_JOB, Key(where, name), patch, "status")

        begin = time.monotonic()
        await each(names, write)
        return time.monotonic() - begin


# --- figures ---------------------------------------------------------------------------------------------------------


async def scale(cluster: KubernetesCluster, count: int, whole: bool) -> None:
    names = [f"job-{number}" for number in range(count)]
    with namespace() as where:
        operator = Operator(where)
        try:
            await operator.ready()
            await asyncio.sleep(2)
            empty = operator.memory_mib()
            status = await first_status(cluster, operator, where)
            # Half of it before and half after: the server gets warmer, and fuller.
            looped = names[:LOOP_MOST]
            loop = await plain_loop(cluster, looped[::2], status)
            before, busy = operator.requests(), operator.cpu_seconds()
            begin = time.monotonic()
            await each(names, lambda name: cluster.create(job(where, name)))
            created = time.monotonic() - begin
            await until(lambda: operator.phase("Starting") == count + 1, pause=0.05)
            started, busy = time.monotonic() - begin, operator.cpu_seconds() - busy
            loop += await plain_loop(cluster, looped[1::2], status)
            report(
                "scale: start",
                jobs=count,
                seconds_to_create=created,
                seconds_to_first_statuses=started,
                jobs_of_plain_loop=len(looped),
                seconds_of_plain_loop=loop,
                ratio=started / count / (loop / len(looped)),
                limit_ratio=1.3,
                operator_cpu_ms_per_job=1000 * busy / count,
            )
            figures = await live(operator, Pods(cluster, where), where, names, whole=whole)
            reads, writes = (now - then for now, then in zip(operator.requests(), before, strict=True))
        finally:
            operator.end()
    report(
        "scale: live",
        jobs=count,
        memory_mib_without_jobs=empty,
        limit_memory_mib=160 + 20 / 1024 * count,
        reads_per_job=reads / count,
        writes_per_job=writes / count,
        limit_writes_per_job=8,
        **figures,
    )


async def first_status(cluster: KubernetesCluster, operator: Operator, where: str) -> Object:
    """What a job that has just been started has to tell; of one that stays as it is."""
    await cluster.create(job(where, "first"))
    await until(lambda: operator.phase("Starting") == 1)
    first = await cluster.read(FINE_TUNE_JOB, Key(where, "first"))
    assert first is not None
    status: Object = first["status"]
    return status


async def live(operator: Operator, pods: Pods, where: str, names: list[str], *, whole: bool) -> dict[str, float]:
    """All jobs begin to run, run, and, for the whole, succeed."""
    await each(names, pods.create)
    seen: dict[str, float] = {}
    watching = asyncio.create_task(statuses(where, "Running", seen))
    async with answering_pods():
        await asyncio.sleep(5)
        steady, rest = names[:STEADY_PODS], names[STEADY_PODS:]
        await at_a_rate(steady, pods.run)
        await until(lambda: len(seen) == len(steady))
        figures = _lags("steady", [seen[name] - pods.changed[name] for name in steady])
        if rest:
            await each(rest, pods.run)
            await until(lambda: len(seen) == len(names))
            figures |= _lags("at_once", [seen[name] - pods.changed[name] for name in rest])
        watching.cancel()
        if not whole:
            return figures | {"memory_mib": operator.memory_mib()}
        # Every trainer has been asked once, so that what follows is rest.
        await asyncio.sleep(len(names) / operator.settings.progress_reads_per_second + 45)
        before = operator.cpu_seconds()
        await asyncio.sleep(IDLE_SECONDS)
        figures["idle_cpu_cores"] = (operator.cpu_seconds() - before) / IDLE_SECONDS
        figures["memory_mib"] = operator.memory_mib()
    begin = time.monotonic()
    await each(names, pods.succeed)
    await until(lambda: operator.phase("Succeeded") == len(names))
    return figures | {"seconds_to_succeed": time.monotonic() - begin}


async def at_a_rate(names: Iterable[str], work: Callable[[str], Awaitable[object]]) -> None:
    """STEADY_RATE of them a second."""
    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(names):
            await asyncio.sleep(max(0.0, begin + number / STEADY_RATE - time.monotonic()))
            group.create_task(asyncio.wait_for(work(name), PATIENCE))


def _lags(how: str, seconds: list[float]) -> dict[str, float]:
    late = sorted(seconds)
    return {
        f"median_seconds_pod_to_status_{how}": statistics.median(late),
        f"p99_seconds_pod_to_status_{how}": late[int(len(late) * 0.99)],
    }


async def failover(cluster: KubernetesCluster) -> None:
    """The leader is killed while jobs come in."""
    with namespace() as where:
        replicas = [Operator(where, lease=f"{where}/finetune", port=18081 + number) for number in range(2)]
        try:
            for replica in replicas:
                await replica.ready()
            await until(lambda: any(replica.figures().get("finetune_operator_leader") for replica in replicas), 60)
            leader = next(one for one in replicas if one.figures().get("finetune_operator_leader"))
            successor = next(one for one in replicas if one is not leader)
            leader.end(signal.SIGKILL)
            killed = time.monotonic()
            await cluster.create(job(where, "after"))
            await until(lambda: successor.phase("Starting") == 1, 60, pause=0.05)
            report("failover", seconds=time.monotonic() - killed, limit_seconds=20)
        finally:
            for replica in replicas:
                replica.end()


async def measure(count: int, whole: bool) -> None:
    install_crd()
    async with connect(await load_configuration()) as cluster:
        await scale(cluster, count, whole)
        if whole:
            await failover(cluster)


def main() -> int:
    if not os.environ.get("KUBECONFIG"):
        print("bench.scale: left out, since KUBECONFIG names no cluster", file=sys.stderr)
        return 0
    count, *words = sys.argv[1:] or ["1000"]
    asyncio.run(measure(int(count), whole=words != ["running"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
