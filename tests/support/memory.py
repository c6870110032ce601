"""How much memory a process and all below it hold, as the kernel counts it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.1


@dataclass(frozen=True)
class Held:
    """Bytes. `pss` shares out pages that several processes map, files among them; `anonymous` has no file behind it."""

    pss: int = 0
    anonymous: int = 0


def held(pid: int) -> Held:
    """By the process and its descendants, now."""
    pss = anonymous = 0
    for found in _family(pid):
        try:
            lines = Path(f"/proc/{found}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended meanwhile
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        pss += sizes["Pss:"]
        anonymous += sizes["Pss_Anon:"]
    return Held(pss, anonymous)


def _family(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for path in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                waiting += map(int, path.read_text().split())
            except OSError:
                continue
    return found


class Peak:
    """The most that a process and its descendants held while this was open."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid or os.getpid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.first = held(self._pid)
        self.most = self.first

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            now = held(self._pid)
            self.most = Held(max(self.most.pss, now.pss), max(self.most.anonymous, now.anonymous))
