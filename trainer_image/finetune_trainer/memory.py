"""This container's memory: its limit, and evidence of the kernel's out-of-memory killer.

The killer leaves nothing else behind in the process that it ends.
"""

from __future__ import annotations

import os
from pathlib import Path

LIMIT_FILE = "memory.max"
V2_FILE, V1_FILE = "memory.events", "memory.oom_control"


def memory_limit(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this container may take; where no limit is found (cgroups of the old kind show none) the machine's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int((cgroup_root / LIMIT_FILE).read_text()))
    except (OSError, ValueError):
        return machine


def oom_kills(cgroup_root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """How many processes of this container the kernel has killed for memory so far; None where that is not told."""
    for file in _candidates(cgroup_root, own):
        if (count := _read_count(file)) is not None:
            return count
    return None


def _candidates(root: Path, own: Path) -> list[Path]:
    """In a container the group is mounted at the root; elsewhere its path stands in /proc/self/cgroup."""
    files = [root / V2_FILE, root / "memory" / V1_FILE]
    if own.exists():
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.insert(0, root / path.lstrip("/") / V2_FILE)
            elif "memory" in controllers.split(","):
                files.insert(0, root / "memory" / path.lstrip("/") / V1_FILE)
    return files


def _read_count(file: Path) -> int | None:
    try:
        words = dict(line.split(maxsplit=1) for line in file.read_text().splitlines())
        return int(words["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None
