"""The memory of this container: how much is left, and whether the kernel has killed somebody for want of it."""

from __future__ import annotations

import os
from pathlib import Path

V2_FILE, V1_FILE = "memory.events", "memory.oom_control"
V2_LIMIT, V1_LIMIT = "memory.max", "memory.limit_in_bytes"
V2_USED, V1_USED = "memory.current", "memory.usage_in_bytes"
ROOT, OWN, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")


def memory_limit(root: Path = ROOT) -> int:
    """Bytes that this container may take; where no limit is found (cgroups of the old kind show none) the machine's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int((root / V2_LIMIT).read_text()))
    except (OSError, ValueError):
        return machine


def available_bytes(root: Path = ROOT, own: Path = OWN, meminfo: Path = MEMINFO) -> int | None:
    """Bytes that this container can still take: of its limit, and of the machine; None where neither is told.

    What the kernel can drop at any time, such as files that were read, counts as free.
    """
    found = [left for group in _groups(root, own) if (left := _left(group)) is not None]
    if meminfo.exists():
        words = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(words["MemAvailable"].split()[0]) * 1024)
    return min(found, default=None)


def _left(group: Path) -> int | None:
    for limit_file, used_file in ((V2_LIMIT, V2_USED), (V1_LIMIT, V1_USED)):
        try:
            limit, used = int((group / limit_file).read_text()), int((group / used_file).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such file, or "max": no limit
        return max(0, limit - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
    return None


def oom_kills(root: Path = ROOT, own: Path = OWN) -> int | None:
    """How many processes of this container the kernel has killed for memory so far; None where that is not told."""
    for group in _groups(root, own):
        for name in (V2_FILE, V1_FILE):
            if (count := _read_count(group / name)) is not None:
                return count
    return None


def _groups(root: Path, own: Path) -> list[Path]:
    """In a container the group is mounted at the root; elsewhere its path stands in /proc/self/cgroup."""
    groups = [root, root / "memory"]
    if own.exists():
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                groups.insert(0, root / path.lstrip("/"))
            elif "memory" in controllers.split(","):
                groups.insert(0, root / "memory" / path.lstrip("/"))
    return groups


def _read_count(file: Path) -> int | None:
    try:
        words = dict(line.split(maxsplit=1) for line in file.read_text().splitlines())
        return int(words["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None
