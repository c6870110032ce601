"""How long a job stands still when its pod is taken from it: from that moment to the first step of the next attempt.

On this machine as a cluster, with the real operator and the real trainer. The floor is what no operator can save: the
same pod from its start to its first step. Eleven times the pod is evicted (which is free, so that the delay must not
grow), three times its rank is killed (after which the Job controller waits by itself: 1 s here, 10 s on a cluster, and
twice as long each time).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.support.models import greetings, save_tiny_llama
from tests.support.processes import processes_in

from bench.common import median, report
from finetune_operator.cluster.local.machine import LocalMachine, StateFolder
from finetune_operator.cluster.port import FINE_TUNE_JOB, POD, Key, Object

EVICTIONS, KILLS = 11, 3
SECONDS = 240.0
POLL_SECONDS = 0.02
STEP = re.compile(r"step \d+/")
KEY = Key("default", "tune")


class Run:
    """One job on one machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machine = LocalMachine(StateFolder(folder / "state"), {})
        self._cluster = self._machine.cluster
        self.floors: list[float] = []

    async def __aenter__(self) -> Run:
        save_tiny_llama(self._folder / "model")
        rows = self._folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in greetings(64)))
        await self._cluster.create(manifest(self._folder))
        self._task = asyncio.create_task(self._machine.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def first_step(self, attempt: int) -> float:
        """The moment of an attempt's first step; adds the time since its pod was started to the floors."""
        deadline, started = time.monotonic() + SECONDS, 0.0
        while time.monotonic() < deadline:
            pod = await self._pod()
            log = self._folder / "state/pods" / (pod["metadata"]["name"] if pod else "-") / "log"
            if pod and log.exists() and pod["metadata"]["annotations"]["finetune.dev/attempt"] == str(attempt):
                started = started or time.monotonic()
                if STEP.search(log.read_text()):
                    self.floors.append(time.monotonic() - started)
                    return time.monotonic()
            await asyncio.sleep(POLL_SECONDS)
        status = (await self._cluster.read(FINE_TUNE_JOB, KEY) or {}).get("status")
        raise TimeoutError(f"attempt {attempt} has not come to a step: {status}")

    async def _pod(self) -> Object | None:
        pods = await self._cluster.list(POD, None, {})
        running = [pod for pod in pods if pod["status"]["phase"] == "Running"]
        return running[0] if running and "deletionTimestamp" not in running[0]["metadata"] else None

    async def evict(self) -> None:
        pod = await self._pod()
        assert pod is not None
        await self._cluster.delete(POD, Key(KEY.namespace, pod["metadata"]["name"]), pod["metadata"]["uid"])

    async def kill(self) -> None:
        """SIGKILL for the rank, as the kernel's out-of-memory killer sends it."""
        (rank,) = [pid for pid in processes_in(self._folder / "state/pods") if _is_rank(pid)]
        os.kill(rank, signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    return b"finetune_trainer.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def manifest(folder: Path) -> Object:
    """A job that takes far longer than this benchmark."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": KEY.name, "namespace": KEY.namespace},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": f"file://{folder}/model"},
            "dataset": {"uri": f"file://{folder}/rows.jsonl"},
            "strategy": {"type": "LoRA"},
            "hyperparameters": {"epochs": 1000, "maxLength": 128, "perDeviceBatchSize": 4},
            "checkpoint": {"everySteps": 50},
            "output": {"uri": f"file://{folder}/out"},
            "runPolicy": {"retries": {"infrastructure": KILLS}},
        },
    }


async def measure() -> tuple[list[float], list[float], list[float]]:
    """Seconds of floors, of evictions and of kills, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        async with Run(Path(folder)) as run:
            attempt = 1
            await run.first_step(attempt)

            async def strike(blow: Callable[[], Awaitable[None]]) -> float:
                nonlocal attempt
                attempt += 1
                begun = time.monotonic()
                await blow()
                return await run.first_step(attempt) - begun

            evictions = [await strike(run.evict) for _ in range(EVICTIONS)]
            kills = [await strike(run.kill) for _ in range(KILLS)]
            return run.floors, evictions, kills


def main() -> None:
    floors, evictions, kills = asyncio.run(measure())
    floor = median(floors)
    report(
        "restarts",
        floor_seconds=floor,
        eviction_seconds=median(evictions),
        eviction_over_floor=median(evictions) - floor,
        first_three=median(evictions[:3]),
        last_three=median(evictions[-3:]),
        kill_seconds=kills[0],
        kill_over_floor=kills[0] - floor,
        kills=[round(value, 2) for value in kills],
    )


if __name__ == "__main__":
    main()
