"""Looking at other processes from tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The condition's value as soon as it is true; an AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_in(folder: Path) -> list[int]:
    """Processes whose working folder lies in this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = (process / "cwd").resolve().is_relative_to(folder)
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
        if inside and is_alive(int(process.name)):
            found.append(int(process.name))
    return found
