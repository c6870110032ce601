"""Which events tell of what this process has written itself, and so of nothing new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, Object

KINDS = (FINE_TUNE_JOB.kind, JOB.kind)
"""Whose writes end a pass in which all that follows from them is done."""


class Echoes:
    """Remembers the version that each object got by our last write of it, until the watch tells of it or of its end.

    An event may come before the answer to the write: it then counts as news, and costs a pass.
    """

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}

    def wrote(self, obj: Object) -> None:
        """The API server has answered a write with this object."""
        if obj.get("kind") in KINDS:
            self._versions[obj["metadata"]["uid"]] = obj["metadata"]["resourceVersion"]

    def is_news(self, metadata: Mapping[str, Any], deleted: bool) -> bool:
        """Whether an event tells of what somebody else has done."""
        uid = metadata["uid"]
        if not deleted and self._versions.get(uid) != metadata["resourceVersion"]:
            return True
        self._versions.pop(uid, None)
        return deleted
