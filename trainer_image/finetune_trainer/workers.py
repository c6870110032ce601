"""The worker processes of a pod, seen from the agent: started early, released by their environment, ended in time.

Workers are fresh interpreters that import the heavy libraries while the agent imports torch and gathers the gang, so
that launching costs no time of its own. They are not forked from an agent that imported for all of them: bitsandbytes
initialises CUDA on import, after which no forked process can use it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_trainer.causes import WorkerEnd, cause_file, read_cause
from finetune_trainer.runtime import ENV_STARTED_AT, Pod

POLL_SECONDS = 0.05


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    channel: int
    killed: bool = False
    exit_code: int | None = field(default=None)


class Workers:
    """All workers of this pod; each leads a process group, so that its helpers end with it.

    Args:
        entrypoint: `module:function` that takes a Context.
        pod: the pod's settings.
        started_at: when launch began, seconds since the epoch.
    """

    def __init__(self, entrypoint: str, pod: Pod, started_at: float) -> None:
        self._pod = pod
        env = _shared_cores(pod) | dict(os.environ) | {ENV_STARTED_AT: repr(started_at)}
        self._workers = [self._start(entrypoint, local_rank, env) for local_rank in range(pod.processes)]

    def _start(self, entrypoint: str, local_rank: int, env: Mapping[str, str]) -> _Worker:
        rank = self._pod.node_rank * self._pod.processes + local_rank
        reader, writer = os.pipe()
        command = [
            sys.executable,
            "-m",
            "finetune_trainer.worker",
            entrypoint,
            str(rank),
            str(reader),
            str(os.getpid()),
        ]
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, pass_fds=[reader], process_group=0, close_fds=True
        )
        os.close(reader)
        return _Worker(rank, process, writer)

    def release(self, local_rank: int, env: Mapping[str, str]) -> int:
        """Send a worker the environment that the gang agreed on, which lets it begin; returns its process id."""
        worker = self._workers[local_rank]
        try:
            os.write(worker.channel, json.dumps(dict(env)).encode() + b"\n")
        except BrokenPipeError:
            print(f"rank {worker.rank} ended before it could begin", file=sys.stderr, flush=True)
        os.close(worker.channel)
        return worker.process.pid

    def poll(self) -> dict[int, int]:
        """Exit codes (negative: the signal) of those that have ended, by rank."""
        for worker in self._workers:
            self._poll_one(worker)
        return {worker.rank: worker.exit_code for worker in self._workers if worker.exit_code is not None}

    def _poll_one(self, worker: _Worker) -> None:
        if worker.exit_code is not None:
            return
        # The helpers are ended before the leader is reaped: after that its process group's number may be another's.
        if os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            _signal_group(worker.process.pid)
            worker.exit_code = worker.process.wait()

    @property
    def processes(self) -> dict[int, int]:
        """Process ids of those that have not ended, by rank."""
        self.poll()
        return {worker.rank: worker.process.pid for worker in self._workers if worker.exit_code is None}

    @property
    def running(self) -> bool:
        """Whether any has not ended."""
        return len(self.poll()) < len(self._workers)

    def terminate(self) -> None:
        """SIGTERM to the ranks alone: their helpers are theirs to end."""
        self.poll()
        for worker in self._workers:
            if worker.exit_code is None:
                os.kill(worker.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all that are left and their helpers; waits for their end."""
        self.poll()
        for worker in self._workers:
            if worker.exit_code is None:
                worker.killed = True
                _signal_group(worker.process.pid)
        self.wait(until=time.monotonic() + 5)

    def wait(self, until: float) -> None:
        """Wait for all to end, until a moment of the monotonic clock."""
        while self.running and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def ends(self) -> list[WorkerEnd]:
        """How each has ended; one that even SIGKILL could not end (stuck in the kernel) counts as killed."""
        self.poll()
        return [
            WorkerEnd(
                rank=worker.rank,
                exit_code=-signal.SIGKILL if worker.exit_code is None else worker.exit_code,
                killed_by_agent=worker.killed,
                record=read_cause(cause_file(self._pod.scratch, worker.rank)),
            )
            for worker in self._workers
        ]


def _shared_cores(pod: Pod) -> dict[str, str]:
    """Each of several processes computes with its share of the cores: all on all would only wait for each other.

    Set in every gang: where it is not, accelerate counts physical cores, which some machines do not tell.
    """
    cores = len(os.sched_getaffinity(0))
    return {} if pod.world_size == 1 else {"OMP_NUM_THREADS": str(max(1, cores // pod.processes))}


def _signal_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
