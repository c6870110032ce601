"""Which replica works: an election by a Lease (coordination.k8s.io/v1), after the rules of Kubernetes' own controllers.

Clocks of two machines are never compared: a replica measures by its own how long the record has not changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from finetune_operator.cluster.port import LEASE, ClusterError, ConflictError, JsonPatch, Key, Kind, Object

log = logging.getLogger(__name__)


class LeadershipLostError(Exception):
    """Another replica leads, or may: from now on nothing may be written."""


class Leases(Protocol):
    """The part of the Cluster port that an election needs."""

    async def read(self, kind: Kind, key: Key) -> Object | None: ...

    async def create(self, obj: Object) -> Object: ...

    async def patch(self, kind: Kind, key: Key, patch: JsonPatch, subresource: str | None = None) -> Object | None: ...


class Elector:
    """One replica's part in the election.

    It leads for two thirds of the Lease's duration from the moment at which it asked for the last renewal that was
    granted; others wait for the whole duration. The third between them is for requests that are still under way.

    Args:
        identity: names this process and no other one, restarts included.
        duration: whole seconds without a renewal after which others may take over.
        clock: monotonic seconds.
        now: the present in UTC, for people who read the record.
    """

    def __init__(
        self,
        leases: Leases,
        key: Key,
        identity: str,
        *,
        duration: int,
        clock: Callable[[], float],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._leases = leases
        self._key = key
        self._identity = identity
        self._duration = duration
        self._clock = clock
        self._now = now
        self._until = float("-inf")
        self._seen: tuple[str, float] | None = None

    @property
    def retry_seconds(self) -> float:
        """Between two rounds."""
        return self._duration / 6

    def leads(self) -> bool:
        """Whether this process may write, at this very moment. Safe to ask from any thread."""
        return self._clock() < self._until

    async def round(self) -> bool:
        """Renew, or take what is free. Returns whether this replica leads. Raises ClusterError: not known.

        Raises:
            LeadershipLostError: it has led, and may no longer.
        """
        led = self._until > float("-inf")
        try:
            async with asyncio.timeout(self._duration / 3):
                await self._try()
        except (ClusterError, TimeoutError) as error:
            log.warning("the Lease %s: %s: %s", self._key, type(error).__name__, error)
        if led and not self.leads():
            raise LeadershipLostError(f"the Lease {self._key} was not renewed in time, or another replica has it")
        return self.leads()

    async def release(self) -> None:
        """Give it up, so that another replica takes over at once. Nothing may be written from here on."""
        led, self._until = self.leads(), float("-inf")
        lease = await self._leases.read(LEASE, self._key) if led else None
        if lease is not None and _holder(lease) == self._identity:
            await self._write(lease, {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1})

    async def _try(self) -> None:
        asked = self._clock()
        lease = await self._leases.read(LEASE, self._key)
        try:
            if lease is None:
                await self._leases.create(self._manifest())
            elif _holder(lease) == self._identity:
                await self._write(lease, {**lease["spec"], "renewTime": self._time()})
            elif self._is_free(lease):
                await self._write(lease, self._spec(transitions=int(lease["spec"].get("leaseTransitions") or 0) + 1))
            else:
                self._until = min(self._until, asked)
                return
        except ConflictError:
            # Another one was faster; the next round sees who.
            return
        self._until = asked + self._duration * 2 / 3

    def _is_free(self, lease: Object) -> bool:
        """Nobody holds it, or it has not changed for as long as its holder has promised to renew it."""
        version = str(lease["metadata"]["resourceVersion"])
        if self._seen is None or self._seen[0] != version:
            self._seen = version, self._clock()
        promised = float(lease["spec"].get("leaseDurationSeconds") or self._duration)
        return not _holder(lease) or self._clock() - self._seen[1] > promised

    async def _write(self, lease: Object, spec: Object) -> None:
        guard = {"op": "test", "path": "/metadata/resourceVersion", "value": lease["metadata"]["resourceVersion"]}
        written = await self._leases.patch(LEASE, self._key, [guard, {"op": "add", "path": "/spec", "value": spec}])
        if written is None:
            raise ConflictError("it was deleted meanwhile")

    def _manifest(self) -> Object:
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {"name": self._key.name, "namespace": self._key.namespace},
            "spec": self._spec(transitions=0),
        }

    def _spec(self, transitions: int) -> Object:
        now = self._time()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._duration,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }

    def _time(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _holder(lease: Object) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")
