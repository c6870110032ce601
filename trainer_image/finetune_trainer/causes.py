"""Why a run ended: every worker writes a record of its own end, and the agent finds the root cause among them.

Never by time: the rank that fails is often the last to be noticed, after its peers broke in a collective.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from finetune_api.common import Message
from finetune_api.contract import ExitCode

CAUSE_FILE_BYTES = 16384
"""Reserved on disk before the work starts, so that a worker that filled the disk can still say so."""
TRACEBACK_CHARACTERS = 8000

HOST_MEMORY_ADVICE = "raise resources.memory (sharedMemory counts against it), or lower hyperparameters.maxLength"
PEER_ADVICE = "look at the other pods of the job: one of them ended first"
SIGNAL_ADVICE = {
    signal.SIGKILL: "something outside the trainer killed it; where memory was tight, raise resources.memory",
    signal.SIGBUS: "most often /dev/shm is full: raise resources.sharedMemory",
    signal.SIGSEGV: "a native library crashed; the image's library versions and the node's hardware are suspects",
    signal.SIGILL: "the node's CPU lacks instructions that the image needs: set scheduling.nodeSelector to other nodes",
}


class Kind(str, Enum):
    """What ended a worker."""

    OWN = "Own"
    SIGNAL = "Signal"
    STOPPED = "Stopped"
    BROKEN = "Broken"


KIND_ORDER = (Kind.OWN, Kind.SIGNAL, Kind.STOPPED, Kind.BROKEN)
"""From cause to effect: a broken collective is somebody else's fault."""


class CauseRecord(Message):
    """The end of one worker, or of the run."""

    kind: Kind
    exit_code: int
    message: str
    advice: str = ""
    rank: int | None = None
    traceback: str = ""


@dataclass(frozen=True)
class WorkerEnd:
    """How a worker process ended: its exit code (negative: the signal), and what it wrote down itself."""

    rank: int
    exit_code: int
    killed_by_agent: bool = False
    record: CauseRecord | None = None


# --- a worker's own record -------------------------------------------------------------------------------------------


def causes_folder(scratch: Path) -> Path:
    return scratch / "causes"


def cause_file(scratch: Path, rank: int) -> Path:
    return causes_folder(scratch) / f"rank-{rank}.json"


def traceback_file(scratch: Path, rank: int) -> Path:
    return causes_folder(scratch) / f"rank-{rank}.traceback"


def reserve_cause_file(path: Path) -> None:
    """Take the disk space of a later record; an empty record says nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b" " * CAUSE_FILE_BYTES)


def write_cause(path: Path, record: CauseRecord) -> None:
    """Write into the space that was reserved, with the oldest part of the traceback cut as far as need be."""
    for kept in (TRACEBACK_CHARACTERS, TRACEBACK_CHARACTERS // 8, 0):
        shortened = record.model_copy(
            update={"traceback": record.traceback[-kept:] if kept else "", "message": record.message[:2000]}
        )
        data = shortened.model_dump_json(exclude_none=True).encode()
        if len(data) <= CAUSE_FILE_BYTES:
            break
    with path.open("r+b") as file:
        file.write(data.ljust(CAUSE_FILE_BYTES))


def read_cause(path: Path) -> CauseRecord | None:
    """What a worker wrote, or None where it died before it could."""
    try:
        return CauseRecord.from_wire(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


# --- the root cause --------------------------------------------------------------------------------------------------


def root_cause(
    ends: Iterable[WorkerEnd],
    agent: CauseRecord | None = None,
    *,
    world_size: int,
    stopping: bool,
    oom_kills: int | None,
) -> CauseRecord | None:
    """The end that explains the others, or None where nothing went wrong.

    Args:
        ends: all workers of this pod.
        agent: what the agent itself stumbled over.
        world_size: ranks of the whole job.
        stopping: whether this pod was asked to stop before the workers had ended.
        oom_kills: processes of this pod that the kernel's out-of-memory killer took; None where that cannot be read.
    """
    records = [agent] if agent else []
    for end in ends:
        if described := _describe(end, world_size=world_size, stopping=stopping, oom_kills=oom_kills):
            records.append(described.model_copy(update={"rank": end.rank}))
    if not records:
        return None
    first = min(records, key=_precedence)
    if stopping and first.kind is Kind.BROKEN:
        # Peers that were asked to stop at the same time went first; the order to stop is the reason for both.
        return first.model_copy(update={"kind": Kind.STOPPED, "exit_code": int(ExitCode.TEMPFAIL)})
    return first


def _precedence(record: CauseRecord) -> tuple[int, bool, int]:
    """Cause before effect, then errors that are understood, then the lowest rank."""
    return KIND_ORDER.index(record.kind), record.exit_code == ExitCode.SOFTWARE, record.rank or 0


def _describe(end: WorkerEnd, *, world_size: int, stopping: bool, oom_kills: int | None) -> CauseRecord | None:
    if end.exit_code == 0:
        return None
    if end.killed_by_agent:
        return _killed_by_agent(end, stopping)
    if end.exit_code < 0:
        return _died_by_signal(-end.exit_code, world_size=world_size, stopping=stopping, oom_kills=oom_kills)
    if end.record is not None and end.record.exit_code == end.exit_code:
        return end.record
    message = f"a worker exited with code {end.exit_code} and left no cause"
    return CauseRecord(kind=Kind.OWN, exit_code=ExitCode.SOFTWARE, message=message, advice="see the pod's log")


def _killed_by_agent(end: WorkerEnd, stopping: bool) -> CauseRecord:
    if end.record is not None:
        return end.record
    if stopping:
        message = "the worker did not stop within the grace period and was killed; steps since the checkpoint are lost"
        advice = "raise runPolicy.terminationGracePeriodSeconds above the time that a checkpoint takes"
        return CauseRecord(kind=Kind.STOPPED, exit_code=ExitCode.TEMPFAIL, message=message, advice=advice)
    message = "the worker was killed after a peer had ended"
    return CauseRecord(kind=Kind.BROKEN, exit_code=ExitCode.UNAVAILABLE, message=message, advice=PEER_ADVICE)


def _died_by_signal(number: int, *, world_size: int, stopping: bool, oom_kills: int | None) -> CauseRecord:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGTERM and stopping:
        message = "stopped on request before the worker was ready; nothing was lost"
        return CauseRecord(kind=Kind.STOPPED, exit_code=ExitCode.TEMPFAIL, message=message)
    if number == signal.SIGKILL and oom_kills:
        message = "the kernel's out-of-memory killer ended a worker: the pod's memory is exhausted"
        return _signalled(ExitCode.OUT_OF_MEMORY, message, HOST_MEMORY_ADVICE)
    if number == signal.SIGABRT and world_size > 1:
        # The watchdogs of NCCL and gloo abort the process from a side thread when a peer is gone.
        message = f"a worker aborted ({name}), as collectives do when a peer is gone"
        return CauseRecord(kind=Kind.BROKEN, exit_code=ExitCode.UNAVAILABLE, message=message, advice=PEER_ADVICE)
    # Only somebody else sends these two; the others are raised by the program itself.
    outside = number in (signal.SIGKILL, signal.SIGTERM)
    advice = SIGNAL_ADVICE.get(signal.Signals(number), "") if name.startswith("SIG") else ""
    message = f"a worker died by {name}"
    return _signalled(ExitCode.UNAVAILABLE if outside else ExitCode.SOFTWARE, message, advice)


def _signalled(code: ExitCode, message: str, advice: str) -> CauseRecord:
    return CauseRecord(kind=Kind.SIGNAL, exit_code=code, message=message, advice=advice)
