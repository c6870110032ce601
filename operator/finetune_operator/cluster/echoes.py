"""Which events tell of what this process has written itself, and so of nothing new."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, Key, Kind, Object

KINDS = (FINE_TUNE_JOB, JOB)
"""Whose writes end a pass in which all that follows from them is done."""


class Echoes:
    """Remembers the version that each object got by our last write of it, until the watch tells of it or of its end."""

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}
        self._under_way: dict[tuple[Kind, Key], asyncio.Event] = {}

    @contextmanager
    def writing(self, kind: Kind, key: Key) -> Iterator[None]:
        """While a write of this object is under way, an event of it may be its echo: often it comes first."""
        if kind not in KINDS:
            yield
            return
        done = self._under_way[kind, key] = asyncio.Event()
        try:
            yield
        finally:
            done.set()
            if self._under_way.get((kind, key)) is done:
                del self._under_way[kind, key]

    def wrote(self, kind: Kind, obj: Object) -> None:
        """The API server has answered a write with this object."""
        if kind in KINDS:
            self._versions[obj["metadata"]["uid"]] = obj["metadata"]["resourceVersion"]

    async def is_news(self, kind: Kind, metadata: Mapping[str, Any], deleted: bool) -> bool:
        """Whether an event tells of what somebody else has done; waits for the end of a write of ours."""
        done = self._under_way.get((kind, Key(metadata["namespace"], metadata["name"])))
        if done is not None:
            await done.wait()
        uid = metadata["uid"]
        if not deleted and self._versions.get(uid) != metadata["resourceVersion"]:
            return True
        self._versions.pop(uid, None)
        return deleted
