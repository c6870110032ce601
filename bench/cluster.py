"""What stands around the jobs of a benchmark on a real API server: operators as processes, and in the place of users,
Job controller and kubelet this process."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from aiohttp import web
from tests.chart.rendering import environment
from tests.e2e.cluster import kubectl
from tests.e2e.operating import result_of

from finetune_api.contract import PROGRESS_PORT
from finetune_operator.cluster.kubernetes import KubernetesCluster
from finetune_operator.cluster.port import JOB, POD, Key, Object
from finetune_operator.settings import load

ROOT = Path(__file__).resolve().parents[1]
CONCURRENCY = 16
"""As many requests at a time as the operator has workers."""
PATIENCE = 1800.0
POD_ADDRESS = "127.0.0.1"


async def each(names: Iterable[str], work: Callable[[str], Awaitable[object]]) -> None:
    """CONCURRENCY at a time."""
    waiting = iter(names)

    async def worker() -> None:
        for name in waiting:
            await work(name)

    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(worker())


async def until(true: Callable[[], object], seconds: float = PATIENCE, pause: float = 0.25) -> None:
    """Until it is so; raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(true):  # noqa: ASYNC110 - what other processes do has no event here
            await asyncio.sleep(pause)


@contextlib.contextmanager
def namespace() -> Any:
    name = f"bench-{secrets.token_hex(3)}"
    kubectl("create", "namespace", name)
    # An API server alone has no controller that makes it, and takes no pod without it; another may have been faster.
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
    kubectl("apply", "-f", "-", stdin=account)
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


class Operator:
    """A process as the chart would start it, without the chart's bounds."""

    def __init__(self, namespace: str, lease: str = "", port: int = 18080) -> None:
        self.port = port
        settings = {
            **environment({"watch": {"namespaces": [namespace]}}),
            "FINETUNE_OPERATOR_HTTP_PORT": str(port),
            "FINETUNE_OPERATOR_LEASE": lease,
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("crds", "operator")),
        }
        self.settings = load([], settings)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-m", "finetune_operator.main"]
        self.process = subprocess.Popen(command, env={**os.environ, **settings}, stderr=self.log)

    async def ready(self) -> None:
        await until(lambda: self._get("/readyz") is not None)

    def _get(self, path: str) -> str | None:
        if self.process.poll() is not None:
            self.log.seek(0)
            raise RuntimeError(f"the operator has ended: {self.log.read().decode()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            return None

    def figures(self) -> dict[str, float]:
        lines = [line for line in (self._get("/metrics") or "").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def requests(self) -> tuple[int, int]:
        """Reads and writes so far."""
        found = {
            name: int(value)
            for name, value in self.figures().items()
            if name.startswith("finetune_operator_api_requests_total")
        }
        reads = sum(value for name, value in found.items() if 'method="GET"' in name)
        return reads, sum(found.values()) - reads

    def phase(self, name: str) -> int:
        return int(self.figures().get(f'finetune_operator_jobs{{phase="{name}"}}', 0))

    def memory_mib(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(60)


class Pods:
    """One pod for each Job, in the phases that the bench wishes."""

    def __init__(self, cluster: KubernetesCluster, where: str) -> None:
        self._cluster = cluster
        self._where = where
        self.changed: dict[str, float] = {}

    async def create(self, name: str) -> None:
        workload = await self._cluster.read(JOB, Key(self._where, name))
        assert workload is not None
        template = copy.deepcopy(workload["spec"]["template"])
        metadata = template["metadata"]
        index = {"batch.kubernetes.io/job-completion-index": "0"}
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": workload["metadata"]["uid"]}
        await self._cluster.create({
            "apiVersion": POD.api_version, "kind": POD.kind,
            "metadata": {
                "name": f"{name}-0", "namespace": self._where, "ownerReferences": [{**owner, "controller": True}],
                "labels": {**metadata["labels"], **index}, "annotations": {**metadata["annotations"], **index},
            },
            "spec": template["spec"],
        })  # fmt: skip

    async def run(self, name: str) -> None:
        await self._set(name, "Running", {"running": {"startedAt": _now()}})

    async def succeed(self, name: str) -> None:
        ended = {"exitCode": 0, "reason": "Completed", "message": result_of(name), "finishedAt": _now()}
        await self._set(name, "Succeeded", {"terminated": ended})
        done = [
            {"type": kind, "status": "True", "reason": "CompletionsReached", "lastTransitionTime": _now()}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        status = {
            "conditions": done, "succeeded": 1, "completedIndexes": "0", "startTime": _now(), "completionTime": _now(),
            "uncountedTerminatedPods": {},
        }  # fmt: skip
        patch = [{"op": "add", "path": "/status", "value": status}]
        await self._cluster.patch(JOB, Key(self._where, name), patch, "status")

    async def _set(self, name: str, phase: str, state: Object) -> None:
        container = {
            "name": "trainer", "image": "x", "imageID": "x", "ready": "running" in state, "restartCount": 0,
            "state": state,
        }  # fmt: skip
        status = {
            "phase": phase,
            "podIP": POD_ADDRESS,
            "podIPs": [{"ip": POD_ADDRESS}],
            "containerStatuses": [container],
        }
        await self._cluster.patch(
            POD, Key(self._where, f"{name}-0"), [{"op": "add", "path": "/status", "value": status}], "status"
        )
        self.changed[name] = time.monotonic()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextlib.asynccontextmanager
async def answering_pods() -> AsyncIterator[None]:
    """All trainers at one address; they report the same again and again."""

    async def progress(_: web.Request) -> web.Response:
        return web.Response(text='{"stage": "Training", "step": 7, "totalSteps": 100}')

    app = web.Application()
    app.router.add_get("/progress", progress)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, POD_ADDRESS, PROGRESS_PORT).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def statuses(where: str, phase: str, seen: dict[str, float]) -> None:
    """Note when the status of each job first tells of a phase, until cancelled; by a watch of our own."""
    command = ["kubectl", "-n", where, "get", "ftj", "-w", "--no-headers", "-o"]
    columns = "custom-columns=NAME:.metadata.name,PHASE:.status.phase"
    process = await asyncio.create_subprocess_exec(*command, columns, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            name, found, *_ = line.decode().split()
            if found == phase:
                seen.setdefault(name, time.monotonic())
    finally:
        process.kill()
        await process.wait()
