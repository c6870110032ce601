"""The ranks of a job, as far as checkpoints need each other."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from finetune_trainer.runtime import Context

if TYPE_CHECKING:
    from torch.distributed import Store

FOREVER = timedelta(days=30)
"""A peer that dies takes the gang along: the agent ends whoever waits."""
_gangs = count()
"""Of this process, by which each has words of its own in the store; all ranks make theirs in the same order."""


class Gang(Protocol):
    """Ranks that save and restore together.

    `gather` is a collective: every rank must call it at the same point of its training thread. `tell`, `hear` and
    `forget` go over a store and may be called by any one thread beside it.
    """

    rank: int
    size: int
    neighbours: range
    """The ranks of this machine, which share its scratch folder; the first one fetches for all."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""

    def tell(self, key: str, text: str) -> None:
        """Let the others hear something, once."""

    def hear(self, key: str) -> str:
        """Wait for what somebody tells."""

    def forget(self, key: str) -> None:
        """Drop what was told, when all who care have heard it; nothing happens where nothing was."""


class Alone:
    """A job of one process."""

    rank, size, neighbours = 0, 1, range(1)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def tell(self, key: str, text: str) -> None:
        """Nobody listens."""

    def hear(self, key: str) -> str:
        raise AssertionError("there is nobody to hear from")

    def forget(self, key: str) -> None:
        """Nothing was kept."""


class Ranks:
    """The ranks of torch's default process group, which must exist when they first speak."""

    def __init__(self, rank: int, size: int, neighbours: range) -> None:
        self.rank, self.size, self.neighbours = rank, size, neighbours
        self._store: Store | None = None
        self._name = f"checkpoints-{next(_gangs)}"

    def gather(self, value: Any) -> list[Any]:
        from finetune_trainer.collectives import all_say

        return all_say(value)

    def tell(self, key: str, text: str) -> None:
        self._own_store().set(key, text)

    def hear(self, key: str) -> str:
        store = self._own_store()
        store.wait([key], FOREVER)
        text: bytes = store.get(key)
        return text.decode()

    def forget(self, key: str) -> None:
        self._own_store().delete_key(key)

    def _own_store(self) -> Store:
        if self._store is None:
            from torch.distributed import PrefixStore
            from torch.distributed.distributed_c10d import _get_default_store

            # A connection of its own: one that waits would keep the process group's from being used.
            self._store = PrefixStore(self._name, _get_default_store().clone())
        return self._store


def gang_of(context: Context) -> Gang:
    """The ranks of a worker's job."""
    if context.world_size == 1:
        return Alone()
    first = context.rank - context.local_rank
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(context.rank, context.world_size, range(first, first + local_size))
