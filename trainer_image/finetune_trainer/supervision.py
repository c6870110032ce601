"""When the workers of a pod are let go on, asked to stop, and ended: the rules, without torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from enum import Enum

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob
from finetune_trainer.causes import CauseRecord
from finetune_trainer.preemption import HURRY_SECONDS, stop_budget
from finetune_trainer.runtime import Pod
from finetune_trainer.stalls import StallWatch, allowed_seconds, end_of_patience, take_stacks
from finetune_trainer.stop_signals import StopSignals
from finetune_trainer.workers import Workers

PEER_SECONDS = 4.0
"""After a failure the peers have this long to notice and to write down what they saw."""
MONITOR_SECONDS = 0.1
ORDERLY = (ExitCode.OK, ExitCode.TEMPFAIL)


class Finding(Enum):
    """What a look at the workers finds."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """One has failed or must be ended, or all have ended and not all with 0."""


class Supervision:
    """Looks after the released workers of a pod.

    Args:
        hear: told whether a rank of this pod has made progress; tells whether one of the gang has.

    Attributes:
        stalled: why the workers had to be ended, if they made no progress.
        stops_with_peers: whether they were asked to stop since another pod was.
    """

    def __init__(
        self, pod: Pod, job: FineTuneJob, workers: Workers, stop: StopSignals, hear: Callable[[bool], bool] = bool
    ) -> None:
        self._pod, self._job, self._workers, self._stop = pod, job, workers, stop
        self._watch = StallWatch(pod.scratch, pod.ranks, allowed_seconds(pod, job), hear)
        self.stalled: CauseRecord | None = None
        self._deadline: float | None = None
        self._forwarded = 0
        self.stops_with_peers = False
        self._overdue: float | None = None

    def look(self) -> Finding:
        """Forward what was asked since the last look, and see how the workers are."""
        ended = self._workers.poll()
        self._forward_stop()
        if any(code not in ORDERLY for code in ended.values()):
            return Finding.FAILED
        if len(ended) < self._pod.processes:
            return self._keep_waiting(ended)
        return Finding.FAILED if any(ended.values()) else Finding.SUCCEEDED

    def stop_with_peers(self) -> None:
        """Another pod of the gang was asked to stop: its ranks leave, so these must, wherever they are now."""
        if self._deadline is None:
            print("another pod was asked to stop; the workers save and leave", file=sys.stderr, flush=True)
            self.stops_with_peers = True
            self._workers.terminate()
            self._allow(stop_budget(self._pod.grace_seconds))

    def settle(self) -> None:
        """End what is left: after a failure the peers may say what they saw, after the deadline nothing more."""
        if not self._late() and self.stalled is None:
            self._workers.wait(until=time.monotonic() + PEER_SECONDS)
        self._workers.kill()

    def _forward_stop(self) -> None:
        if self._stop.count > self._forwarded:
            self._forwarded = self._stop.count
            print("asked to stop; the workers save and leave", file=sys.stderr, flush=True)
            # Once is a request, twice is a hurry: that the peers came first must not make it one.
            if not (self.stops_with_peers and self._forwarded == 1):
                self._workers.terminate()
            self._allow(stop_budget(self._pod.grace_seconds) if self._forwarded == 1 else HURRY_SECONDS)

    def _keep_waiting(self, ended: Mapping[int, int]) -> Finding:
        """A rank that ended by request (of any pod of the gang) will be followed by its peers when they have saved."""
        if ExitCode.TEMPFAIL in ended.values() and self._deadline is None:
            self._allow(stop_budget(self._pod.grace_seconds))
        return Finding.FAILED if self._late() or self._hangs() else Finding.RUNNING

    def _hangs(self) -> bool:
        """Whether patience is over. Not while they stop: that has a deadline of its own."""
        seconds = self._watch.overdue() if self._deadline is None else None
        if seconds is None:
            return False
        if self._pod.nodes > 1 and self._may_wait(seconds):
            return False
        self.stalled = end_of_patience(self._pod, self._job, self._workers.processes, seconds)
        return True

    def _may_wait(self, seconds: float) -> bool:
        """The culprit's pod may find it a little later, and its ranks that wait would end it when these are gone."""
        if self._overdue is None or seconds < self._overdue:
            if not all(one.waits for one in take_stacks(self._pod.scratch, self._workers.processes)):
                return False
            # From now on it is somebody else's fault: a rank that does something else then is about to end.
            self._overdue = seconds
        return seconds - self._overdue < self._watch.peers_seconds

    def _allow(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._deadline = until if self._deadline is None else min(self._deadline, until)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def run_alone(pod: Pod, job: FineTuneJob, workers: Workers, stop: StopSignals) -> CauseRecord | None:
    """Run the only worker of a job to its end; why that had to be brought about, if it made no progress.

    Without torch's agent: there is no gang to gather, and importing torch here would cost a lone rank 220 MB of the
    pod's memory and, on busy cores, two seconds of its own imports.
    """
    supervision = Supervision(pod, job, workers, stop)
    stop.defer()
    workers.release(0, {})
    while supervision.look() is Finding.RUNNING:
        time.sleep(MONITOR_SECONDS)
    supervision.settle()
    return supervision.stalled
