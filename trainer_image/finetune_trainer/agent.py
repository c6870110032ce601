"""torch's elastic agent for a gang that starts and ends as one: no restarts of its own, and ends in bounded time.

It extends SimpleElasticAgent, torch's base class for agents that bring their own processes: LocalElasticAgent's give
peers 30 s after a failure, send them the same SIGTERM that asks for a checkpoint, and keep only the first exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from finetune_api.contract import ExitCode
from finetune_trainer.diagnosis import PeersLostError
from finetune_trainer.preemption import HURRY_SECONDS, stop_budget
from finetune_trainer.rendezvous import GangRendezvous
from finetune_trainer.runtime import Pod, result_file
from finetune_trainer.stop_signals import StopSignals
from finetune_trainer.workers import Workers

PEER_SECONDS = 4.0
"""After a failure the peers have this long to notice and to write down what they saw."""
FAREWELL_SECONDS = 30.0
"""How long index 0 waits after its success for the others to hear of it."""
MONITOR_SECONDS = 0.1
ORDERLY = (ExitCode.OK, ExitCode.TEMPFAIL)
ROLE = "trainer"


class GangAgent(SimpleElasticAgent):
    """Runs the pod's workers to their common end; how each ended is read from `workers` afterwards."""

    def __init__(self, pod: Pod, workers: Workers, stop: StopSignals, patience: float) -> None:
        rendezvous = GangRendezvous(pod, patience, watch=self._give_up_early)
        spec = WorkerSpec(
            role=ROLE, local_world_size=pod.processes, rdzv_handler=rendezvous, entrypoint=ROLE, max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
        )  # fmt: skip
        super().__init__(spec)
        # All pods have the same number of ranks, so that no exchange is needed to number them.
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
        self._pod, self._workers, self._stop = pod, workers, stop
        self._deadline: float | None = None
        self._forwarded = 0

    def _give_up_early(self) -> None:
        if self._workers.poll():
            raise PeersLostError("a worker of this pod ended before the gang was complete")

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # From here on a signal is forwarded: the workers may have something to save.
        self._stop.defer()
        return {worker.local_rank: self._release(worker, worker_group) for worker in worker_group.workers}

    def _release(self, worker: Any, group: WorkerGroup) -> int:
        env = {
            "RANK": worker.global_rank,
            "LOCAL_RANK": worker.local_rank,
            "WORLD_SIZE": worker.world_size,
            "LOCAL_WORLD_SIZE": self._pod.processes,
            "GROUP_RANK": group.group_rank,
            "GROUP_WORLD_SIZE": group.group_world_size,
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": group.master_port,
            "TORCHELASTIC_RUN_ID": group.spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1,
        }
        return self._workers.release(worker.local_rank, {name: str(value) for name, value in env.items()})

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = self._workers.poll()
        self._forward_stop()
        if any(code not in ORDERLY for code in ended.values()):
            return RunResult(state=WorkerState.FAILED)
        if len(ended) < self._pod.processes:
            return RunResult(state=self._keep_waiting(ended))
        if any(ended.values()):
            return RunResult(state=WorkerState.FAILED)
        return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(ended))

    def _forward_stop(self) -> None:
        if self._stop.count > self._forwarded:
            self._forwarded = self._stop.count
            self._workers.terminate()
            print("asked to stop; the workers save and leave", file=sys.stderr, flush=True)
            self._allow(stop_budget(self._pod.grace_seconds) if self._forwarded == 1 else HURRY_SECONDS)

    def _keep_waiting(self, ended: dict[int, int]) -> WorkerState:
        """A rank that ended by request (of any pod of the gang) will be followed by its peers when they have saved."""
        if ExitCode.TEMPFAIL in ended.values() and self._deadline is None:
            self._allow(stop_budget(self._pod.grace_seconds))
        late = self._deadline is not None and time.monotonic() > self._deadline
        return WorkerState.FAILED if late else WorkerState.HEALTHY

    def _allow(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._deadline = until if self._deadline is None else min(self._deadline, until)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        late = self._deadline is not None and time.monotonic() > self._deadline
        if not late:
            self._workers.wait(until=time.monotonic() + PEER_SECONDS)
        self._workers.kill()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._workers.kill()

    def _exit_barrier(self) -> None:
        """A pod ends with OK only after index 0 has: one that had exited 0 would not be started again with the gang.

        Index 0 has delivered and does not depend on the others; it only waits for them to hear of it.
        """
        store, group = self._store, self._worker_group
        if self._pod.nodes == 1:
            return
        if group.group_rank == 0:
            self._say_farewell(store, self._pod.nodes)
        else:
            self._await_delivery(store)

    def _say_farewell(self, store: Any, nodes: int) -> None:
        if not result_file(self._pod.scratch).exists():
            return
        store.set("delivered", "1")
        until = time.monotonic() + FAREWELL_SECONDS
        while store.add("heard", 0) < nodes - 1 and time.monotonic() < until and not self._stop.count:
            time.sleep(MONITOR_SECONDS)

    def _await_delivery(self, store: Any) -> None:
        try:
            while not store.check(["delivered"]):
                if self._stop.count:
                    raise PeersLostError("asked to stop while waiting for index 0 to deliver")
                time.sleep(MONITOR_SECONDS)
            store.add("heard", 1)
        except RuntimeError as error:
            raise PeersLostError(f"index 0 ended before it had delivered: {error}") from error
