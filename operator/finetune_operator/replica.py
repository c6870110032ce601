"""This process as one of several replicas: its election runs beside the work, in a thread of its own.

With an event loop and a connection of its own as well: however busy the work is, renewals go out in time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from finetune_operator.cluster.kubernetes import connect, load_configuration
from finetune_operator.cluster.port import Key
from finetune_operator.election import Elector, LeadershipLostError
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)


class Replica:
    """Whether this process works, and the way to stop that.

    Args:
        lost: called in the election's thread when leadership is lost; the process must end at once.
    """

    def __init__(self, settings: Settings, lost: Callable[[], None]) -> None:
        self.leading = asyncio.Event()
        """Set once this process leads; it never leads twice."""
        self._settings = settings
        self._lost = lost
        self._main = asyncio.get_running_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._elector: Elector | None = None
        self._thread: threading.Thread | None = None
        self._stopping = asyncio.Event()
        if settings.lease:
            self._thread = threading.Thread(target=self._run, name="election", daemon=True)
            self._thread.start()
        else:
            self.leading.set()

    def leads(self) -> bool:
        """Whether it may write at this moment. Safe to ask from any thread."""
        return self._thread is None or (self._elector is not None and self._elector.leads())

    async def release(self) -> None:
        """Give the Lease up, once nothing is under way any more."""
        if self._thread is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopping.set)
        await asyncio.to_thread(self._thread.join, self._settings.lease_seconds)

    def _run(self) -> None:
        try:
            asyncio.run(self._elect())
        except LeadershipLostError as error:
            log.error("%s; this process ends", error)
            self._lost()
        except Exception:
            # Without an election nobody may write: the same as a loss.
            log.exception("the election failed; this process ends")
            self._lost()

    async def _elect(self) -> None:
        self._loop, seconds = asyncio.get_running_loop(), self._settings.lease_seconds
        async with connect(await load_configuration(), request_seconds=seconds / 3) as cluster:
            elector = self._elector = Elector(
                cluster,
                Key(*self._settings.lease.split("/")),
                f"{socket.gethostname()}_{uuid.uuid4()}",
                duration=seconds,
                clock=time.monotonic,
            )
            while not self._stopping.is_set():
                if await elector.round() and not self.leading.is_set():
                    log.info("this replica leads now")
                    self._main.call_soon_threadsafe(self.leading.set)
                with suppress(TimeoutError):
                    async with asyncio.timeout(elector.retry_seconds):
                        await self._stopping.wait()
            await elector.release()


def end_process() -> None:
    """At once, whatever the other threads are at: nothing that they write now would be right."""
    logging.shutdown()
    os._exit(1)


@asynccontextmanager
async def replica(settings: Settings, lost: Callable[[], None] = end_process) -> AsyncIterator[Replica]:
    """This process as a replica; at the end of the block the Lease is given up, also where the block failed."""
    this = Replica(settings, lost)
    try:
        yield this
    finally:
        await this.release()
