"""Reads the trainers' progress in the background, at a bounded rate over all jobs, so that no pass waits for a pod."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.contract import Progress
from finetune_operator.cluster.port import Cluster, Key, Object
from finetune_operator.observed import uid

MOST_INTERVALS = 2
"""Of the time between two tries that may count as the pod's silence: what is more is the poller's own lateness."""
PARALLEL_READS = 32
"""Reads under way at a time: pods that do not answer take two seconds each and must not hold up the others."""


@dataclass
class _Watched:
    pod: Object
    due: float
    progress: Progress | None = None
    unanswered: float | None = None
    """When the last try ended, if it was left unanswered."""
    silence: float = 0.0
    """Seconds for which its tries have been left unanswered."""
    told: float = float("-inf")
    """When its news was passed on last."""


class ProgressPoller:
    """Asks index 0 of every running job in turn and remembers the newest answer.

    Args:
        interval: seconds between two reads of one job.
        rate: most reads a second over all jobs.
        pace: least seconds between two times that `changed` is told of a job of which only the numbers are new: a
            trainer that trains has new ones whenever it is asked, and each time costs a pass.
        patience: seconds of silence that `changed` is told of.
        changed: told of a job whose progress is new, and when its pod falls silent or speaks again.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        interval: float,
        rate: float,
        pace: float,
        patience: float,
        changed: Callable[[Key], None],
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._interval = interval
        self._gap = 1.0 / rate
        self._pace = pace
        self._patience = patience
        self._changed = changed
        self._clock = clock
        self._watched: dict[Key, _Watched] = {}
        self._slots = asyncio.Semaphore(PARALLEL_READS)

    def latest(self, key: Key, pod: Object) -> Progress | None:
        """The newest answer of this pod; a pod that is new is asked as soon as the rate allows."""
        watched = self._watched.get(key)
        if watched is None or uid(watched.pod) != uid(pod):
            watched = self._watched[key] = _Watched(_address(pod), self._clock())
        watched.pod = _address(pod)
        return watched.progress

    def silence(self, key: Key) -> float:
        """Seconds for which the pod of `latest` has left every try to ask it unanswered; 0 if it answers."""
        watched = self._watched.get(key)
        return watched.silence if watched is not None else 0.0

    def forget(self, key: Key) -> None:
        self._watched.pop(key, None)

    async def poll_due(self) -> int:
        """Read every pod that is due, at the bounded rate. Returns how many were read."""
        now = self._clock()
        due = sorted((item.due, key) for key, item in self._watched.items() if item.due <= now)
        async with asyncio.TaskGroup() as group:
            for number, (_, key) in enumerate(due):
                if number:
                    await asyncio.sleep(self._gap)
                group.create_task(self._read(key))
        return len(due)

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            await self.poll_due()
            await asyncio.sleep(max(self._gap, min(1.0, self._interval / 4)))

    async def _read(self, key: Key) -> None:
        watched = self._watched.get(key)
        if watched is None:
            return
        watched.due = self._clock() + self._interval
        async with self._slots:
            progress = await self._cluster.read_progress(watched.pod)
        if self._is_news(watched, progress):
            watched.told = self._clock()
            self._changed(key)

    def _is_news(self, watched: _Watched, progress: Progress | None) -> bool:
        """Take an answer, or that there was none, and say whether it has to be looked at now."""
        before, silence = watched.progress, watched.silence
        self._note(watched, progress is not None)
        if progress is None:
            return silence < self._patience <= watched.silence
        watched.progress = progress
        if before is None or silence >= self._patience or _beside_numbers(before) != _beside_numbers(progress):
            return True
        return before != progress and self._clock() - watched.told >= self._pace

    def _note(self, watched: _Watched, answered: bool) -> None:
        now = self._clock()
        if answered:
            watched.unanswered, watched.silence = None, 0.0
            return
        if watched.unanswered is not None:
            watched.silence += min(now - watched.unanswered, MOST_INTERVALS * self._interval)
        watched.unanswered = now


def _beside_numbers(progress: Progress) -> tuple[object, ...]:
    """What is told at once."""
    return progress.attempt, progress.stage, progress.checkpoint, progress.warnings


def _address(pod: Object) -> Object:
    """What it takes to ask a pod: the whole of it is some 40 KiB here, and stays as long as its job runs."""
    metadata = pod["metadata"]
    return {
        "metadata": {"name": metadata["name"], "uid": metadata["uid"]},
        "status": {"podIP": (pod.get("status") or {}).get("podIP")},
    }
