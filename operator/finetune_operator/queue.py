"""A keyed work queue: a key waits at most once, is worked on by one worker at a time, and comes back after failures."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from finetune_operator.cluster.port import Key

log = logging.getLogger(__name__)
Work = Callable[[Key], Awaitable[float | None]]
"""Works on a key; returns the seconds after which it wants to see the key again, or None."""


@dataclass(frozen=True)
class Backoff:
    """Seconds until the n-th retry: doubling from base to cap, spread by half so that failures do not march in step."""

    base: float
    cap: float
    rng: random.Random

    def delay(self, failures: int) -> float:
        """failures: how often in a row it failed, from 1."""
        full = min(self.cap, self.base * 2.0 ** min(failures - 1, 60))
        return full * self.rng.uniform(0.5, 1.0)


class Line(IntEnum):
    """Where a key waits; the lower number is served first."""

    CHANGED = 0
    """Something that exists has changed: people look at what runs, and it may stand still."""
    NEW = 1
    """Something has come into being, or a delay is over: thousands may come at once."""
    CALM = 2
    """It has time: progress, and looks at what may have been missed."""


SHARE = 4
"""Every fourth turn is for a new key, and every fourth of these turns for one that has time, so that no line waits for
ever."""


class KeyedQueue:
    """Not thread-safe: everything happens in one event loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, backoff: Backoff, clock: Callable[[], float]) -> None:
        self._backoff = backoff
        self._clock = clock
        self._lines: tuple[dict[Key, None], ...] = tuple({} for _ in Line)
        self._taken = 0
        self._working: set[Key] = set()
        self._again: dict[Key, Line] = {}
        self._due: dict[Key, float] = {}
        self._timers: list[tuple[float, int, Key]] = []
        self._failures: dict[Key, int] = {}
        self._serial = itertools.count()
        self._changed = asyncio.Event()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """Keys that are ready to be worked on."""
        return sum(len(waiting) for waiting in self._lines)

    def put(self, key: Key, line: Line = Line.NEW) -> None:
        """Now; a key in work is worked on again afterwards. Of two lines the one that is served first holds."""
        if self._closed:
            return
        self._due.pop(key, None)
        if key in self._working:
            self._again[key] = min(line, self._again.get(key, line))
            return
        if not any(key in waiting for waiting in self._lines[: line + 1]):
            for waiting in self._lines[line + 1 :]:
                waiting.pop(key, None)
            self._lines[line][key] = None
            self._changed.set()

    def put_after(self, key: Key, seconds: float) -> None:
        """Later; the earlier of two times holds."""
        at = self._clock() + seconds
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            heapq.heappush(self._timers, (at, next(self._serial), key))
            self._changed.set()

    def next_due(self) -> float | None:
        """Seconds until the next delayed key is ready; None when there is none."""
        while self._timers and self._due.get(self._timers[0][2]) != self._timers[0][0]:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - self._clock()) if self._timers else None

    def take(self) -> Key | None:
        """The key that has been ready longest in the line whose turn it is, or None; it must be given back by done or
        fail."""
        self._ripen()
        if self._closed or not self:
            return None
        self._taken += 1
        turn = Line.CHANGED if self._taken % SHARE else Line.NEW if self._taken % SHARE**2 else Line.CALM
        waiting = self._lines[turn] or next(keys for keys in self._lines if keys)
        key = next(iter(waiting))
        del waiting[key]
        self._working.add(key)
        self._idle.clear()
        return key

    def done(self, key: Key, again_after: float | None = None) -> None:
        """It went well: failures are forgotten."""
        self._failures.pop(key, None)
        self._release(key, again_after)

    def fail(self, key: Key) -> float:
        """It failed: back-off. Returns the delay in seconds."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        delay = self._backoff.delay(failures)
        self._release(key, delay)
        return delay

    async def close(self) -> None:
        """Give out no key any more; returns when no key is in work."""
        self._closed = True
        for waiting in self._lines:
            waiting.clear()
        await self._idle.wait()

    async def wait(self) -> None:
        """Until a key may be ready."""
        timeout = self.next_due()
        self._changed.clear()
        if self:
            return
        # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._changed.wait()

    def _ripen(self) -> None:
        while (wait := self.next_due()) is not None and wait <= 0:
            self.put(heapq.heappop(self._timers)[2])

    def _release(self, key: Key, again_after: float | None) -> None:
        self._working.discard(key)
        if not self._working:
            self._idle.set()
        if key in self._again:
            self.put(key, self._again.pop(key))
        elif again_after is not None:
            self.put_after(key, again_after)


async def run_worker(queue: KeyedQueue, work: Work) -> None:
    """Work for ever. What goes wrong with one key is logged and tried again; it never ends the worker."""
    while True:
        key = queue.take()
        if key is None:
            await queue.wait()
            continue
        try:
            again_after = await work(key)
        except asyncio.CancelledError:
            queue.done(key)
            raise
        except Exception as error:
            delay = queue.fail(key)
            log.warning("%s: %s: %s; again in %.1f s", key, type(error).__name__, error, delay)
        else:
            queue.done(key, again_after)
