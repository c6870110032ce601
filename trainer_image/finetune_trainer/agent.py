"""torch's elastic agent for several ranks that start and end as one: no restarts of its own, an end in bounded time.

It extends SimpleElasticAgent, torch's base class for agents that bring their own processes: LocalElasticAgent's give
peers 30 s after a failure, send them the same SIGTERM that asks for a checkpoint, and keep only the first exit code.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from finetune_api.job import FineTuneJob
from finetune_trainer.causes import CauseRecord
from finetune_trainer.diagnosis import PeersLostError
from finetune_trainer.pulse import Pulse
from finetune_trainer.rendezvous import GangRendezvous
from finetune_trainer.runtime import Pod, result_file
from finetune_trainer.stop_signals import StopSignals
from finetune_trainer.supervision import MONITOR_SECONDS, ORDERLY, Finding, Supervision
from finetune_trainer.workers import Workers

FAREWELL_SECONDS = 30.0
"""How long index 0 waits after its success for the others to hear of it."""
HURRIED_FAREWELL_SECONDS = 5.0
ROLE = "trainer"
STATES = {
    Finding.RUNNING: WorkerState.HEALTHY,
    Finding.SUCCEEDED: WorkerState.SUCCEEDED,
    Finding.FAILED: WorkerState.FAILED,
}


class GangAgent(SimpleElasticAgent):
    """Runs the pod's workers to their common end; how each ended is read from `workers` afterwards."""

    def __init__(self, pod: Pod, job: FineTuneJob, workers: Workers, stop: StopSignals, patience: float) -> None:
        rendezvous = GangRendezvous(pod, patience, watch=self._give_up_early)
        spec = WorkerSpec(
            role=ROLE, local_world_size=pod.processes, rdzv_handler=rendezvous, entrypoint=ROLE, max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
        )  # fmt: skip
        super().__init__(spec)
        # All pods have the same number of ranks, so that no exchange is needed to number them.
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
        self._pod, self._workers, self._stop = pod, workers, stop
        self._pulse: Pulse | None = None
        self._supervision = Supervision(pod, job, workers, stop, self._hear)
        self._moves = 0

    @property
    def stalled(self) -> CauseRecord | None:
        """Why the workers had to be ended, if they made no progress."""
        return self._supervision.stalled

    @property
    def stops_with_peers(self) -> bool:
        """Whether the workers were asked to stop since another pod was."""
        return self._supervision.stops_with_peers

    def _hear(self, moved: bool) -> bool:
        """Whether a rank of the gang has made progress since this was asked last."""
        if self._pulse is None:
            return moved
        if moved:
            self._pulse.tell_move()
        known, self._moves = self._moves, self._pulse.moves
        return moved or self._moves != known

    def _listen(self) -> None:
        """Stop with the first pod that is asked to; give up when one is dead. Raises PeersLostError."""
        if self._pulse is None:
            return
        if self._pulse.stopped and not self._stop.count:
            self._supervision.stop_with_peers()
        lost = self._pulse.lost()
        if lost is not None:
            raise PeersLostError(lost)

    def _give_up_early(self) -> None:
        if self._workers.poll():
            raise PeersLostError("a worker of this pod ended before the gang was complete")

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # From here on a signal is forwarded: the workers may have something to save.
        self._stop.defer()
        if self._pod.nodes > 1:
            self._pulse = Pulse(self._pod, worker_group.master_addr, int(worker_group.master_port))
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
        if self._pulse is not None and self._stop.count:
            self._pulse.tell_stop()
        finding = self._supervision.look()
        if finding is Finding.RUNNING:
            self._listen()
        else:
            self._tell_end(finding)
        ranks = [worker.global_rank for worker in worker_group.workers]
        return RunResult(state=STATES[finding], return_values=dict.fromkeys(ranks))

    def _tell_end(self, finding: Finding) -> None:
        """After a success the pulse goes on: index 0 may deliver for long, and each must notice when the other dies."""
        if self._pulse is None:
            return
        ended = self._workers.poll()
        if len(ended) == self._pod.processes and all(code in ORDERLY for code in ended.values()):
            self._pulse.tell_done()
        if finding is not Finding.SUCCEEDED:
            self._pulse.end()

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._supervision.settle()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._workers.kill()

    def _exit_barrier(self) -> None:
        """A pod ends with OK only after index 0 has: one that had exited 0 would not be started again with the gang.

        Index 0 has delivered and does not depend on the others; it only waits for them to hear of it.
        """
        if self._pulse is None:
            return
        try:
            if self._pod.node_rank == 0:
                self._say_farewell(self._pulse)
            else:
                self._await_delivery(self._pulse)
        finally:
            self._pulse.end()

    def _say_farewell(self, pulse: Pulse) -> None:
        if not result_file(self._pod.scratch).exists():
            return
        pulse.tell_delivered()
        begun = time.monotonic()
        while pulse.heard < self._pod.nodes - 1:
            # Asked to stop, it still owes them the word: they would count it as lost, and start all over.
            patience = HURRIED_FAREWELL_SECONDS if self._stop.count else FAREWELL_SECONDS
            if time.monotonic() - begun > patience:
                return
            time.sleep(MONITOR_SECONDS)

    def _await_delivery(self, pulse: Pulse) -> None:
        """Asks the pulse and not the store: a call to a store whose host is gone may block for minutes.

        That another pod was asked to stop is no reason to leave: index 0 delivers all the same, or ends.
        """
        while not pulse.delivered:
            if self._stop.count:
                raise PeersLostError("asked to stop while waiting for index 0 to deliver")
            lost = pulse.lost()
            if lost is not None:
                raise PeersLostError(f"index 0 ended before it had delivered: {lost}")
            time.sleep(MONITOR_SECONDS)
