"""One rank: `python -m finetune_trainer.worker`, started by the agent and by nobody else.

It imports the entry point, waits for the environment that the gang agreed on, runs it, and whatever happens writes
down its own end before it exits.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from io import TextIOBase
from typing import NoReturn, TextIO

from finetune_api import contract
from finetune_api.job import FineTuneJob
from finetune_trainer.causes import CauseRecord, Kind, cause_file, reserve_cause_file, traceback_file, write_cause
from finetune_trainer.diagnosis import classify
from finetune_trainer.errors import TrainerError
from finetune_trainer.heartbeat import Heartbeat, heartbeat_file
from finetune_trainer.preemption import StopFlag, die_with_parent, tame_forked_children
from finetune_trainer.progress import Reporter
from finetune_trainer.progress_server import serve
from finetune_trainer.runtime import Context, Pod, load_job, progress_file
from finetune_trainer.stacks import answer_with_stacks, stacks_file

LONE_RANK_FORGETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""accelerate starts a process group wherever it sees these, be it that launch itself was started with them."""


class RankedStream(TextIOBase):
    """A text stream whose lines begin with the rank, for logs that many ranks share."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream, self._prefix, self._pending = stream, f"[rank {rank}] ", ""

    def write(self, text: str) -> int:
        *lines, self._pending = (self._pending + text).split("\n")
        if lines:
            # One write for all whole lines, so that those of several ranks do not mix.
            self._emit("".join(f"{self._prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, ""
            self._emit(self._prefix + pending)

    def _emit(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def main() -> NoReturn:
    entrypoint, rank, channel, agent_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    die_with_parent(agent_pid)
    pod = Pod.from_environment()
    stop = StopFlag(pod.grace_seconds)
    stop.install()
    stacks = answer_with_stacks(stacks_file(pod.scratch, rank), rank)
    if pod.world_size == 1:
        for name in LONE_RANK_FORGETS:
            os.environ.pop(name, None)
    _prepare_streams(pod.world_size, rank)
    reserve_cause_file(cause_file(pod.scratch, rank))
    reporter = Reporter(pod.attempt, rank, progress_file(pod.scratch), Heartbeat(heartbeat_file(pod.scratch, rank)))
    code = 0
    try:
        _run(entrypoint, channel, stop, reporter)
    except BaseException as error:
        code = record_end(error, pod, rank, reporter)
    stacks.close()
    _leave(code)


def _run(entrypoint: str, channel: int, stop: StopFlag, reporter: Reporter) -> None:
    entry = _load(entrypoint)
    _take_environment(channel)
    stop.check()
    tame_forked_children()
    context = Context.from_environment(stop=stop, reporter=reporter)
    if context.is_main:
        serve(reporter, os.environ.get(contract.ENV_POD_IP, "127.0.0.1"), contract.PROGRESS_PORT)
    entry(context)


def _load(entrypoint: str) -> Callable[[Context], None]:
    module, _, name = entrypoint.partition(":")
    entry: Callable[[Context], None] = getattr(importlib.import_module(module), name)
    return entry


def _take_environment(channel: int) -> None:
    """Wait for the agent's word; an agent that is gone takes this process along."""
    with os.fdopen(channel) as reader:
        line = reader.readline()
    if not line:
        os._exit(1)
    os.environ.update(json.loads(line))


def _prepare_streams(world_size: int, rank: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A worker that is killed must not take its last lines along.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if world_size > 1:
        # Before anything else is imported: log handlers keep the stream that they found.
        sys.stdout = RankedStream(sys.stdout, rank)
        sys.stderr = RankedStream(sys.stderr, rank)


def record_end(error: BaseException, pod: Pod, rank: int, reporter: Reporter) -> int:
    """Write down what ended this rank; returns the exit code."""
    if isinstance(error, SystemExit):
        if error.code in (0, None):
            return 0
        message = f"the program exited by itself with {error.code!r}"
        record = CauseRecord(kind=Kind.OWN, exit_code=contract.ExitCode.SOFTWARE, message=message)
    else:
        record = classify(error, _job(pod, reporter))
    if not isinstance(error, TrainerError):
        traceback.print_exception(error)
    reporter.save()
    try:
        write_cause(cause_file(pod.scratch, rank), record)
        traceback_file(pod.scratch, rank).write_text(record.traceback)
    except OSError as failure:
        print(f"cannot write down the cause: {failure}", file=sys.stderr)
    return record.exit_code


def _job(pod: Pod, reporter: Reporter) -> FineTuneJob | None:
    """As it runs: advice must not name what Auto has come to anyway."""
    try:
        job = load_job(pod.job_file)
    except TrainerError:
        return None
    if (sharding := reporter.snapshot().sharding) is not None:
        job.spec.distributed.sharding = sharding
    return job


def _leave(code: int) -> NoReturn:
    """Exit at once: what libraries do at exit (joining threads of a broken process group) may never end.

    Helpers that are left are ended by the agent.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
