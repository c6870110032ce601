"""Whether this process does its work, for the kubelet: alive, or better started anew; ready, or better waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from finetune_operator.cluster.port import ClusterError
from finetune_operator.watches import Watches

log = logging.getLogger(__name__)
KNOCK_SECONDS = 5.0
"""Between two requests that only ask whether the API server answers; with an idle operator nothing else would tell."""


class Health:
    """What is known of this process's health.

    Args:
        watches: what liveness goes by.
    """

    def __init__(self, watches: Watches) -> None:
        self._watches = watches
        self.listed = asyncio.Event()
        """Set when every kind has been listed once."""
        self.reachable = False
        """Whether the API server has answered the last time."""
        self.stopping = False

    def ailing(self) -> str:
        """Why this process should be started anew; empty when it need not."""
        dead = self._watches.dead()
        return f"the API server has news that the watch of {', '.join(dead)} does not deliver" if dead else ""

    def unready(self) -> str:
        """Why it is not ready; empty when it is."""
        if self.stopping:
            return "it is stopping"
        if not self.listed.is_set():
            return "the jobs have not been listed yet"
        return "" if self.reachable else "the API server does not answer"

    async def knock_for_ever(self, knock: Callable[[], Awaitable[None]]) -> None:
        """See whether the API server answers, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(KNOCK_SECONDS):
                    await knock()
                self.reachable = True
            except (ClusterError, TimeoutError) as error:
                if self.reachable:
                    log.warning("the API server does not answer: %s", error)
                self.reachable = False
            await asyncio.sleep(KNOCK_SECONDS)
