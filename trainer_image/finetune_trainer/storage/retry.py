"""Trying again: a store that is away for a while is waited for, one that stays away is reported."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from finetune_trainer.errors import UnavailableError
from finetune_trainer.storage.errors import TransientError
from finetune_trainer.storage.settings import TransferSettings

T = TypeVar("T")
log = logging.getLogger(__name__)


class CancelledError(Exception):
    """Another part of the same transfer failed for good, or the caller gave up."""


class Patience:
    """How long failures of one request are borne: the time runs from the first failure after the last progress."""

    def __init__(self, settings: TransferSettings, stop: threading.Event) -> None:
        self._settings = settings
        self._stop = stop
        self.progress()

    def progress(self) -> None:
        """Something worked: failures are counted anew."""
        self._failures = 0
        self._failing_since = 0.0

    def pause(self, error: TransientError) -> None:
        """Wait before the next try.

        Raises:
            UnavailableError: it has gone on for too long.
            CancelledError: the transfer was given up meanwhile.
        """
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > self._settings.patience_seconds:
            raise UnavailableError(
                f"{error} (tried {self._failures + 1} times in {now - self._failing_since:.0f} s)",
                "check that the endpoint is up and can be reached from the pod",
            ) from error
        delay = min(self._settings.first_backoff_seconds * 2**self._failures, self._settings.max_backoff_seconds)
        self._failures += 1
        log.warning("%s; trying again", error)
        # Jitter, lest all threads and pods come back at the same moment.
        if self._stop.wait(delay * random.uniform(0.5, 1.0)):
            raise CancelledError from error


def patiently(action: Callable[[], T], settings: TransferSettings, stop: threading.Event) -> T:
    """The result of an action that may fail with TransientError some times."""
    patience = Patience(settings, stop)
    while True:
        try:
            return action()
        except TransientError as error:
            patience.pause(error)
