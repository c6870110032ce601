"""One job on this machine, from its start until it has ended or was suspended."""

from __future__ import annotations

import asyncio
import signal
from enum import Enum

from finetune_api.status import TERMINAL, Phase
from finetune_operator.cli.display import Display
from finetune_operator.cluster.local.machine import LocalMachine
from finetune_operator.cluster.memory import Change
from finetune_operator.cluster.port import FINE_TUNE_JOB, Key, Object

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, kill, and a terminal that is closed: each suspends the job, so that nothing is lost."""


class End(Enum):
    """How a session ended."""

    SUCCEEDED = 0
    FAILED = 1
    SUSPENDED = 130
    KILLED = 131


class Session:
    """Runs the machine until the job needs it no more; the first signal suspends the job, the second kills it."""

    def __init__(self, machine: LocalMachine, key: Key, display: Display) -> None:
        self._machine = machine
        self._key = key
        self._display = display
        self._over = asyncio.Event()
        self._killed = False
        self._suspending: asyncio.Task[Object | None] | None = None
        machine.cluster.subscribe(self._notice)

    async def run(self) -> tuple[End, Object]:
        """Raises what the machine raises."""
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

    async def _outcome(self) -> tuple[End, Object]:
        job = await self._machine.cluster.read(FINE_TUNE_JOB, self._key)
        if job is None:
            raise RuntimeError(f"the job {self._key} is gone from the local state")
        ends: dict[str, End] = {Phase.SUCCEEDED.value: End.SUCCEEDED, Phase.FAILED.value: End.FAILED}
        phase = str((job.get("status") or {}).get("phase"))
        return ends.get(phase, End.KILLED if self._killed else End.SUSPENDED), job

    def _notice(self, change: Change) -> None:
        if change.kind is not FINE_TUNE_JOB or change.key != self._key:
            return
        self._display.show(change.obj)
        phase = (change.obj.get("status") or {}).get("phase")
        suspended = phase == Phase.SUSPENDED and change.obj["spec"].get("suspend")
        if phase in TERMINAL or suspended:
            self._over.set()

    def _interrupt(self) -> None:
        if self._suspending is not None:
            self._killed = True
            self._over.set()
            return
        self._display.say("Stopping: the trainer saves a checkpoint first. Once more ends it at once.")
        patch = [{"op": "add", "path": "/spec/suspend", "value": True}]
        self._suspending = asyncio.create_task(self._machine.cluster.patch(FINE_TUNE_JOB, self._key, patch))
