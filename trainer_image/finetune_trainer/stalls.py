"""Ranks that make no progress: noticed by the pod's agent, shown by their stacks, and ended with a cause of their own.

What counts is the progress of the whole gang. While one rank works alone (it prepares, it delivers) the others wait for
it in a collective; and in lockstep nobody gets further than a step beyond a rank that hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob
from finetune_trainer.causes import CauseRecord, Kind
from finetune_trainer.errors import UsageError
from finetune_trainer.heartbeat import heartbeat_file, read_beats
from finetune_trainer.runtime import Pod, load_job
from finetune_trainer.stacks import STACKS_SIGNAL, Frame, main_stack, place, stacks_file, waits_for_peers

LOOKS = 20
"""How often it is looked within the time that is allowed."""
MOST_SECONDS_BETWEEN = 30.0
HEARING_SECONDS = 3.0
"""From a move until the agents of all pods know: their pulse beats once a second."""
DUMP_SECONDS = 5.0
"""How long a process may take to write its stacks; it needs milliseconds if it is scheduled at all."""
KEEP_SECONDS = 20.0
"""How long the bucket may take: it may be what hangs."""
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device", "Z": "dead"}
ADVICE = (
    "look where its threads stand; where a step, an evaluation or loading the model honestly takes so long, raise "
    "runPolicy.stallTimeoutSeconds"
)


class StallWatch:
    """Counts the time without progress.

    Args:
        ranks: of this pod.
        limit: seconds that are allowed; asked again when they are over, since the job may have been changed.
        hear: told whether a rank of this pod has moved; tells whether one of the gang has.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scratch: Path,
        ranks: Iterable[int],
        limit: Callable[[], float],
        hear: Callable[[bool], bool] = bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = [heartbeat_file(scratch, rank) for rank in ranks]
        self._ask, self._hear, self._clock = limit, hear, clock
        self._limit = limit()
        self._looked = clock()
        self._beats: list[int | None] = []
        self._idle = 0.0

    @property
    def _every(self) -> float:
        """Seconds between looks."""
        return min(self._limit / LOOKS, MOST_SECONDS_BETWEEN)

    @property
    def peers_seconds(self) -> float:
        """How much later the watch of another pod may find the same standstill."""
        return 2 * self._every + HEARING_SECONDS

    def overdue(self) -> float | None:
        """Seconds without progress if they are too many, else None; cheap enough to be asked all the time."""
        now, every = self._clock(), self._every
        if now - self._looked < every:
            return None
        # Time in which this process was frozen itself says nothing about the others.
        passed, self._looked = min(now - self._looked, 2 * every), now
        beats = [read_beats(file) for file in self._files]
        moved, self._beats = beats != self._beats, beats
        self._idle = 0.0 if self._hear(moved) else self._idle + passed
        if self._idle < self._limit:
            return None
        self._limit = self._ask()
        return self._idle if self._idle >= self._limit else None


def allowed_seconds(pod: Pod, job: FineTuneJob) -> Callable[[], float]:
    """runPolicy.stallTimeoutSeconds as the job says now."""
    known = [float(job.spec.run_policy.stall_timeout_seconds)]

    def ask() -> float:
        try:
            known[0] = float(load_job(pod.job_file).spec.run_policy.stall_timeout_seconds)
        except UsageError as error:
            print(f"{error.message}; {known[0]:.0f} s without progress stay allowed", file=sys.stderr, flush=True)
        return known[0]

    return ask


# --- what a pod shows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a rank that may hang shows of itself.

    Attributes:
        text: the stacks of all its threads as faulthandler writes them; empty where it left none.
        stack: the main thread's, newest call first.
        state: of the process, in words; empty where it is nothing special.
    """

    rank: int
    text: str
    stack: list[Frame]
    state: str

    @property
    def waits(self) -> bool:
        return waits_for_peers(self.stack)

    def __str__(self) -> str:
        if self.stack:
            return f"rank {self.rank} hangs in {place(self.stack)}"
        return f"rank {self.rank} left no stacks{f': its process is {self.state}' if self.state else ''}"


def end_of_patience(pod: Pod, job: FineTuneJob, processes: Mapping[int, int], seconds: float) -> CauseRecord:
    """Take the stacks of the pod's ranks, into the log and the bucket; tells what is known of the culprit.

    Args:
        processes: process ids by rank, of those that have not ended.
        seconds: how long no rank has made progress.
    """
    shown = take_stacks(pod.scratch, processes)
    for one in shown:
        print(f"--- {one}\n{one.text}", file=sys.stderr, flush=True)
    where = _keep(pod, job, shown)
    return describe(shown, seconds, where)


def describe(shown: list[Shown], seconds: float, where: str) -> CauseRecord:
    """The cause, with the lowest rank that does not merely wait for others.

    Where all wait the culprit is in another pod, which says so itself: then this one is only affected.
    """
    culprits = [one for one in shown if not one.waits]
    waiting = len(shown) - len(culprits)
    parts = [f"no rank made progress for {seconds:.0f} s"]
    if culprits:
        parts.append("; ".join(map(str, culprits[:2])))
    parts += [f"{waiting} of this pod's ranks wait for others in a collective"] if waiting else []
    return CauseRecord(
        kind=Kind.OWN if culprits else Kind.BROKEN,
        exit_code=ExitCode.STALLED,
        message=f"{': '.join(parts[:2])}{''.join(f'; {part}' for part in parts[2:])}; all stacks are in {where}",
        advice=ADVICE,
        rank=culprits[0].rank if culprits else None,
    )


def take_stacks(scratch: Path, processes: Mapping[int, int], patience: float = DUMP_SECONDS) -> list[Shown]:
    """Let every rank write its stacks, and read them."""
    files = {rank: stacks_file(scratch, rank) for rank in processes}
    # A process that has not got so far as to answer would be ended by the signal.
    sizes = {rank: file.stat().st_size for rank, file in files.items() if file.exists()}
    for rank in sizes:
        os.kill(processes[rank], STACKS_SIGNAL)
    until = time.monotonic() + patience
    while not all(_is_told(files[rank], size) for rank, size in sizes.items()) and time.monotonic() < until:
        time.sleep(0.05)
    return [_shown(rank, files[rank], pid) for rank, pid in sorted(processes.items())]


def _is_told(file: Path, before: int) -> bool:
    """The main thread is the last that is written, with the entry point at its end."""
    text = file.read_text(errors="replace")
    return len(text.encode()) > before and text.endswith("\n") and "_run_module_as_main" in text.rsplit("\n\n", 1)[-1]


def _shown(rank: int, file: Path, pid: int) -> Shown:
    text = file.read_text(errors="replace") if file.exists() else ""
    return Shown(rank, text, main_stack(text), process_state(pid))


def process_state(pid: int) -> str:
    """What the kernel says of a process that does not even answer signals; see proc_pid_stat(5)."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return STATES.get(letter, "")


def _keep(pod: Pod, job: FineTuneJob, shown: list[Shown]) -> str:
    """Put the stacks beside the report; where they are to be found."""
    folder = f"{job.spec.output.uri.rstrip('/')}/report/stalls/attempt-{pod.attempt:04d}"
    kept: list[str] = []

    def write() -> None:
        # Imported only now: a healthy agent does without.
        from finetune_trainer.storage import Store

        try:
            with Store.connect(os.environ) as store:
                for one in shown:
                    store.write_bytes(f"{folder}/rank-{one.rank:05d}.txt", (one.text or f"{one}\n").encode())
            kept.append(folder)
        except Exception as error:  # the border of a thread: the stall is told even when nothing can be kept
            print(f"the stacks cannot be written to {folder}: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, name="stalls", daemon=True)
    thread.start()
    thread.join(KEEP_SECONDS)
    return kept[0] if kept else "the pod's log"
