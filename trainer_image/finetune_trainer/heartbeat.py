"""Signs of life of a rank, in a slot of shared memory that its agent reads: a beat costs one store into it."""

from __future__ import annotations

import mmap
from pathlib import Path

SLOT_BYTES = 8
PAGE_BYTES = 4096


def heartbeat_file(scratch: Path, rank: int) -> Path:
    """Where a rank's beats are counted."""
    return scratch / "heartbeats" / f"rank-{rank}"


class Heartbeat:
    """Counts the beats of this process in a file that others may read at any time, even when this one hangs in C."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written, not only sized: a store into a page that a full disk cannot hold would end the process.
        file.write_bytes(bytes(PAGE_BYTES))
        with file.open("r+b") as opened:
            self._slot = memoryview(mmap.mmap(opened.fileno(), PAGE_BYTES)).cast("Q")

    def beat(self) -> None:
        """Count one; the number has no other meaning than that it changed."""
        self._slot[0] = (self._slot[0] + 1) & 0xFFFFFFFFFFFFFFFF


def read_beats(file: Path) -> int | None:
    """How often a rank has beaten; None while it has no slot."""
    try:
        with file.open("rb") as opened:
            return int.from_bytes(opened.read(SLOT_BYTES), "little")
    except FileNotFoundError:
        return None
