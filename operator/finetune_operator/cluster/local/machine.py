"""This machine as a cluster: the in-memory API server with its controllers, a node of processes, and the operator."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import aiohttp

from finetune_api.contract import LABEL_JOB, Progress
from finetune_operator.cluster import trainers
from finetune_operator.cluster.jobs import JobController
from finetune_operator.cluster.kubelet import Kubelet
from finetune_operator.cluster.local.runtime import TRAINER, ProcessRuntime, machine_gpus
from finetune_operator.cluster.memory import Change, MemoryCluster
from finetune_operator.cluster.port import CONFIG_MAP, FINE_TUNE_JOB, Key, Object
from finetune_operator.cluster.queues import OpenQueue
from finetune_operator.cluster.statefile import StateFile
from finetune_operator.engine import Engine
from finetune_operator.settings import Settings

TICK_SECONDS = 0.2
"""How soon the end of a process is noticed."""
BACK_OFF_SECONDS = 1.0
"""Pause after a first failure; shorter than a cluster's ten, since nobody else waits for this machine."""
SETTINGS = Settings(
    trainer_image="this-python",
    workers=2,
    # A status write costs a small file here, and somebody is watching.
    progress_poll_seconds=1.0,
    progress_write_seconds=0.0,
    backoff_max_seconds=10.0,
    http_port=0,
)


class InUseError(RuntimeError):
    """Another process works with this state folder."""


class StateFolder:
    """`finetune run`'s memory: objects, pods' logs, volumes and the embedded S3 server's data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.objects = path / "objects.json"
        self.pods = path / "pods"
        self.claims = path / "volumes"
        self.s3 = path / "s3"
        self._lock: TextIO | None = None

    def lock(self) -> None:
        """Take it for this process, until it ends; raises InUseError."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InUseError(
                f"another `finetune run` works in {self.path}: wait for it, or give --state-dir another folder"
            ) from None
        self._lock = lock

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class LocalMachine:
    """Runs what is in its cluster while `run` runs.

    Args:
        overrides: variables for every pod, such as the embedded S3 server's.
        program: arguments of Python in a pod.
    """

    def __init__(
        self,
        state: StateFolder,
        overrides: Mapping[str, str],
        *,
        environ: Mapping[str, str] = os.environ,
        program: Sequence[str] = TRAINER,
    ) -> None:
        self.cluster = MemoryCluster(state=StateFile(state.objects), read_progress=fetch_progress)
        self.runtime = ProcessRuntime(
            state.pods,
            state.claims,
            lambda key: self.cluster.get(CONFIG_MAP, key),
            environ=environ,
            overrides=overrides,
            program=program,
            gpus=machine_gpus(environ),
        )
        self._engine = Engine(self.cluster, SETTINGS)
        self._jobs = JobController(self.cluster, back_off_seconds=BACK_OFF_SECONDS)
        self._kubelet = Kubelet(self.cluster, self.runtime)
        self._queue = OpenQueue(self.cluster)
        self._changed = asyncio.Event()
        self.cluster.subscribe(self._notice)

    async def run(self) -> None:
        """Until cancelled; leaves no process behind."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._engine.run())
                group.create_task(self._tend())
        finally:
            self.runtime.kill_all()

    def _notice(self, change: Change) -> None:
        self._changed.set()
        if change.kind is FINE_TUNE_JOB:
            self._engine.put(change.key)
            return
        job = change.obj["metadata"].get("labels", {}).get(LABEL_JOB)
        if job:
            self._engine.put(Key(change.key.namespace, job))

    async def _tend(self) -> None:
        """What Job controller and kubelet do, whenever something has changed, may have ended or is due."""
        while True:
            self._changed.clear()
            wait = await self._jobs.sync()
            await self._queue.sync()
            await self._kubelet.sync()
            timeouts = [seconds for seconds in (wait, TICK_SECONDS if self._kubelet.busy else None) if seconds]
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(timeouts, default=None)):
                    await self._changed.wait()


async def fetch_progress(pod: Object) -> Progress | None:
    """GET /progress of a pod on this machine."""
    async with aiohttp.ClientSession() as http:
        return await trainers.read_progress(http, pod)
