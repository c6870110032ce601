"""Jobs on this machine, from their start until they have ended or were suspended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from finetune_api.status import TERMINAL, Phase
from finetune_operator.cli.display import Display
from finetune_operator.cluster.local.machine import LocalMachine
from finetune_operator.cluster.memory import Change
from finetune_operator.cluster.port import FINE_TUNE_JOB, Key, Object
from finetune_operator.lifecycle import HOPELESS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, kill, and a terminal that is closed: each suspends the jobs, so that nothing is lost."""


class End(Enum):
    """How a job stands when the session is over."""

    SUCCEEDED = 0
    FAILED = 1
    BLOCKED = 2
    SUSPENDED = 130
    KILLED = 131


def end_of(job: Object, killed: bool = False) -> End:
    """How this job stands.

    Args:
        killed: whether whatever has not ended was killed.
    """
    status = job.get("status") or {}
    ends: dict[str, End] = {Phase.SUCCEEDED.value: End.SUCCEEDED, Phase.FAILED.value: End.FAILED}
    phase = str(status.get("phase"))
    if phase in ends:
        return ends[phase]
    if killed:
        return End.KILLED
    return End.BLOCKED if _is_hopeless(status) else End.SUSPENDED


def exit_code(ends: Iterable[End]) -> int:
    """Of the command: 130 where a signal has left something to be done, 1 where something went wrong."""
    found = set(ends)
    if found & {End.SUSPENDED, End.KILLED}:
        return 130
    return 1 if found & {End.FAILED, End.BLOCKED} else 0


class Session:
    """Runs the machine until no job needs it more; the first signal suspends the jobs, the second kills them."""

    def __init__(self, machine: LocalMachine, keys: Sequence[Key], display: Display) -> None:
        self._machine = machine
        self._keys = tuple(keys)
        self._display = display
        self._open = set(keys)
        self._over = asyncio.Event()
        self._killed = False
        self._suspending: list[asyncio.Task[Object | None]] = []
        machine.cluster.subscribe(self._notice)

    async def run(self) -> list[tuple[End, Object]]:
        """How each job stands in the end. Raises what the machine raises."""
        loop = asyncio.get_running_loop()
        # What is ignored stays ignored: nohup is meant.
        obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in obeyed:
            loop.add_signal_handler(number, self._interrupt)
        running = asyncio.create_task(self._machine.run())
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait((running, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for number in obeyed:
                loop.remove_signal_handler(number)
            over.cancel()
            running.cancel()
            await asyncio.gather(running, over, return_exceptions=True)
        if not running.cancelled() and (error := running.exception()) is not None:
            raise error
        return await self._outcome()

    async def _outcome(self) -> list[tuple[End, Object]]:
        found = []
        for key in self._keys:
            job = await self._machine.cluster.read(FINE_TUNE_JOB, key)
            if job is None:
                raise RuntimeError(f"the job {key} is gone from the local state")
            found.append((end_of(job, self._killed), job))
        return found

    def _notice(self, change: Change) -> None:
        if change.kind is not FINE_TUNE_JOB or change.key not in self._keys:
            return
        self._display.show(change.obj)
        if _is_at_rest(change.obj):
            self._open.discard(change.key)
        else:
            self._open.add(change.key)
        if not self._open:
            self._over.set()

    def _interrupt(self) -> None:
        if self._suspending:
            self._killed = True
            self._over.set()
            return
        self._display.say("Stopping: the trainer saves a checkpoint first. Once more ends it at once.")
        patch = [{"op": "add", "path": "/spec/suspend", "value": True}]
        self._suspending = [
            asyncio.create_task(self._machine.cluster.patch(FINE_TUNE_JOB, key, patch)) for key in sorted(self._open)
        ]


def _is_at_rest(job: Object) -> bool:
    """Whether nothing will happen to it in this session any more."""
    status = job.get("status") or {}
    phase = status.get("phase")
    suspended = phase == Phase.SUSPENDED and job["spec"].get("suspend")
    return phase in TERMINAL or bool(suspended) or _is_hopeless(status)


def _is_hopeless(status: Mapping[str, Any]) -> bool:
    """Whether it waits for what nobody can do here while the session runs."""
    return status.get("phase") == Phase.BLOCKED and status.get("reason") in HOPELESS
