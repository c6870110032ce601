"""SIGTERM as launch hears it: at once while there is nothing to save, counted once the workers run."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequested(BaseException):
    """Raised out of whatever launch is doing; no `except Exception` of a library may swallow it."""


class StopSignals:
    """Counts the requests to stop; until `defer` was called each raises StopRequested."""

    def __init__(self) -> None:
        self.count = 0
        self._deferred = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if not self._deferred:
            raise StopRequested

    def defer(self) -> None:
        """From now on only count."""
        self._deferred = True

    def wait(self, seconds: float) -> bool:
        """Whether a request came (or had come) within some seconds."""
        until = time.monotonic() + seconds
        while not self.count and time.monotonic() < until:
            time.sleep(0.1)
        return self.count > 0
