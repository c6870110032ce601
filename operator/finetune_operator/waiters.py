"""Which jobs wait for which others, so that these can wake them. In memory: a new process looks at every job anyway."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_operator.cluster.port import Key


class Waiters:
    """An index in both directions; as large as the number of jobs that are held."""

    def __init__(self) -> None:
        self._waits_for: dict[Key, frozenset[Key]] = {}
        self._waited_for_by: dict[Key, set[Key]] = {}

    def set(self, waiter: Key, others: Iterable[Key]) -> None:
        """From now on it waits for these, and for no others."""
        for other in self._waits_for.pop(waiter, frozenset()):
            self._waited_for_by[other].discard(waiter)
            if not self._waited_for_by[other]:
                del self._waited_for_by[other]
        if wanted := frozenset(others):
            self._waits_for[waiter] = wanted
        for other in wanted:
            self._waited_for_by.setdefault(other, set()).add(waiter)

    def of(self, other: Key) -> tuple[Key, ...]:
        """Who waits for it."""
        return tuple(sorted(self._waited_for_by.get(other, ())))
