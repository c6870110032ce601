"""Stopping on request: the flag that SIGTERM sets, how all ranks agree on it, and who dies with whom."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

from finetune_trainer.errors import StoppedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXIT_SECONDS = 10.0
"""Kept back from the grace period for the agent: it ends the workers and writes the last word of the pod."""
HURRY_SECONDS = 5.0
"""What is left to the workers after a second request to stop."""
VOTE_TIMEOUT = timedelta(hours=1)
"""A vote waits for the slowest rank's step. Dead peers break it at once, or the agents notice and end the ranks."""
PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def stop_budget(grace_seconds: float) -> float:
    """Seconds that workers have between SIGTERM and being killed; at least half of a short grace period."""
    return max(grace_seconds - EXIT_SECONDS, grace_seconds / 2)


class StopFlag:
    """Set by SIGTERM, read by the training thread between steps.

    Args:
        grace_seconds: time between SIGTERM and SIGKILL of the pod.
        world_size: number of ranks that must agree.
    """

    def __init__(self, grace_seconds: float, world_size: int = 1) -> None:
        self.world_size = world_size
        self._grace = grace_seconds
        self._deadline = math.inf
        self._group: ProcessGroup | None = None

    def install(self) -> None:
        """Let SIGTERM set the flag. SIGINT is the agent's to hear: a terminal sends it to every process at once."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Runs between any two bytecodes of the training thread: plain assignments only, no locks and no logging.
        self.request()

    def request(self) -> None:
        """Ask for the stop, as SIGTERM does; asking again leaves little time."""
        allowed = stop_budget(self._grace) if self._deadline == math.inf else HURRY_SECONDS
        self._deadline = min(self._deadline, time.monotonic() + allowed)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop (or all ranks have agreed to)."""
        return self._deadline != math.inf

    def seconds_left(self) -> float:
        """Seconds until the agent kills this process; infinite while no stop was requested."""
        return max(0.0, self._deadline - time.monotonic())

    def check(self) -> None:
        """Leave the phases before and after training, where there is nothing to save; raises StoppedError."""
        if self.requested:
            raise StoppedError("stopped on request outside of training; nothing was lost")

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective call, the same answer on all ranks.

        Every rank must call it at the same step boundary. It goes over a process group of its own on the CPU (0.3 ms),
        since a reduction on the accelerator would wait for the step's kernels.
        """
        if self.world_size == 1:
            return self.requested
        import torch
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=VOTE_TIMEOUT)
        votes = torch.tensor([int(self.requested)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        if votes.item() and not self.requested:
            self.request()
        # What was voted, not the flag: a signal that came after the vote is for the next step, on all ranks.
        return bool(votes.item())


def die_with_parent(parent_pid: int | None = None) -> None:
    """Let the kernel kill this process when the thread that started it ends.

    Args:
        parent_pid: who the parent must still be; where it is somebody else, the parent died before this call.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def shield_from_sigterm() -> None:
    """Call first in helper processes (data loading, upload): the rank that owns them ends them, not a signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


def tame_forked_children() -> None:
    """Keep forked helpers from inheriting the rank's SIGTERM handler, and from outliving the rank.

    A pool whose workers only set a flag on SIGTERM cannot be terminated, so the signal is held back until they have
    let go of the handler. Children forked by a side thread are left without the death signal, since it would come when
    that thread ends.
    """
    owner = threading.get_ident()
    forking = threading.local()

    def hold() -> None:
        forking.owner = threading.get_ident() == owner
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def tame() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if forking.owner:
            die_with_parent()
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=tame)
