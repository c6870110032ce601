"""A control plane over the in-memory cluster, with a clock that only the test moves and pods that obey the test."""

from __future__ import annotations

from typing import Any

from finetune_api.contract import Progress
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.memory import Admission, MemoryCluster, admit_by_crd
from finetune_operator.cluster.port import (
    EVENT,
    FINE_TUNE_JOB,
    JOB,
    POD,
    Cluster,
    ClusterError,
    JsonPatch,
    Key,
    Object,
)
from finetune_operator.engine import Engine
from finetune_operator.settings import Settings
from tests.support.scripted import Clock, Node, ScriptedRuntime

KEY = Key("ml", "tune")
RESULT = {
    "exitCode": 0,
    "result": {
        "job": "tune",
        "output": {"uri": "s3://out/tune/adapter", "kind": "adapter", "report": "s3://out/tune/report/index.html"},
        "steps": 40,
        "epochs": 1.0,
        "loss": 1.7065432,
        "metrics": {"eval_loss": 1.8312345},
        "baseline": {"eval_loss": 2.5},
    },
}


def manifest(name: str = "tune", **spec: Any) -> Object:
    """A FineTuneJob as a user applies it; top-level fields of spec by name."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "ml"},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": "s3://models/smol"},
            "dataset": {"uri": "s3://data/pairs.jsonl"},
            "strategy": {"type": "LoRA"},
            "output": {"uri": "s3://out/tune"},
            **spec,
        },
    }


def typed(**spec: Any) -> FineTuneJob:
    """The same, typed, as the API server would hand it out."""
    raw = manifest(**spec)
    raw["metadata"]["uid"] = "uid-of-tune"
    return FineTuneJob.from_wire(raw)


class World:
    """One cluster, its controllers, and an operator that can be killed and started again."""

    def __init__(
        self, settings: Settings | None = None, runtime: ScriptedRuntime | None = None, admit: Admission = admit_by_crd
    ) -> None:
        self.clock = Clock()
        self.progress: Progress | None = None
        self.cluster = MemoryCluster(clock=self.clock, read_progress=self._read_progress, admit=admit)
        self.node = Node(self.cluster, self.clock, runtime)
        self.settings = settings or Settings()
        self.engine = self.operator(self.cluster)

    async def _read_progress(self, pod: Object) -> Progress | None:
        return self.progress

    def operator(self, cluster: Cluster) -> Engine:
        """A fresh operator process over this cluster: it knows nothing but what it reads."""
        return Engine(
            cluster,
            self.settings,
            clock=self.clock,
            monotonic=self._seconds,
        )

    def _seconds(self) -> float:
        return self.clock.now.timestamp()

    async def create(self, **spec: Any) -> Object:
        return await self.cluster.create(manifest(**spec))

    async def pass_once(self, key: Key = KEY) -> float | None:
        return await self.engine.reconciler.reconcile(key)

    async def settle(self, key: Key = KEY, passes: int = 30) -> None:
        """Operator and controllers act in turn until nothing changes; progress is read when it is due."""
        for _ in range(passes):
            before = await self._versions()
            await self.engine.poller.poll_due()
            wanted = await self.pass_once(key)
            await self.node.settle()
            if wanted != 0.0 and before == await self._versions():
                return
        raise AssertionError(f"{key} does not come to rest")

    async def sit_out_back_off(self) -> None:
        """The Job controller waits for up to ten minutes before it replaces a pod that failed."""
        self.clock.forward(601)
        await self.node.settle()
        await self.settle()

    async def _versions(self) -> list[str]:
        kinds = (FINE_TUNE_JOB, JOB, POD)
        return [obj["metadata"]["resourceVersion"] for kind in kinds for obj in await self.cluster.list(kind, None, {})]

    async def status(self, key: Key = KEY) -> Object:
        raw = await self.cluster.read(FINE_TUNE_JOB, key)
        assert raw is not None
        status: Object = raw.get("status") or {}
        return status

    async def phase(self) -> tuple[str | None, str | None]:
        status = await self.status()
        return status.get("phase"), status.get("reason")

    async def conditions(self) -> dict[str, str]:
        return {item["type"]: item["status"] for item in (await self.status()).get("conditions", [])}

    async def workload(self) -> Object:
        job = await self.cluster.read(JOB, KEY)
        assert job is not None
        return job

    async def job_is_taken_up(self, key: Key = KEY) -> None:
        """The Job controller has come to a Job, and has made no pods."""
        job = await self.cluster.read(JOB, key)
        assert job is not None
        started = self.clock.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.cluster.set_status(JOB, key, {**job.get("status", {}), "startTime": started})

    async def pods(self, live: bool = True) -> list[Object]:
        pods = await self.cluster.list(POD, KEY.namespace, {})
        return [pod for pod in pods if not live or pod["status"]["phase"] in ("Pending", "Running")]

    async def end(self, code: int, message: str = "", reason: str = "") -> None:
        """The live pods' containers end with this."""
        for pod in await self.pods():
            self.node.runtime.end(pod["metadata"]["name"], code, message, reason)
        await self.node.settle()

    async def set_suspend(self, value: bool) -> None:
        patch: JsonPatch = [{"op": "add", "path": "/spec/suspend", "value": value}]
        await self.cluster.patch(FINE_TUNE_JOB, KEY, patch)

    async def events(self) -> list[tuple[str, str]]:
        return [(event["reason"], event["message"]) for event in await self.cluster.list(EVENT, KEY.namespace, {})]


class FaultyCluster:
    """Passes calls on to a cluster; the n-th one fails before or after it took effect, as when the operator is killed.

    Counts reads and writes as well: `asked` holds the kinds of the former in order, `writes` the names of the latter.
    """

    WRITES = ("create", "apply", "patch", "delete", "emit")

    def __init__(self, inner: Cluster, fail_at: int | None = None, after: bool = False) -> None:
        self._inner = inner
        self._fail_at = fail_at
        self._after = after
        self.calls = 0
        self.writes: list[str] = []
        self.asked: list[str] = []

    def walk(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner.walk(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            fails = self.calls == self._fail_at
            if fails and not self._after:
                raise Killed(f"before call {self.calls} ({name})")
            if name in self.WRITES:
                self.writes.append(name)
            elif name in ("read", "list"):
                self.asked.append(args[0].kind)
            answer = await method(*args, **kwargs)
            if fails:
                raise Killed(f"after call {self.calls} ({name})")
            return answer

        return call


def admit_all(obj: Object, old: Object | None) -> Object:
    """For tests that look at something else: the CEL engine takes its time."""
    return obj


class Killed(BaseException):
    """The operator's process is gone; nothing in it may catch this."""


__all__ = ["KEY", "RESULT", "ClusterError", "FaultyCluster", "Killed", "World", "admit_all", "manifest", "typed"]
