"""What is prepared on a machine is prepared once, by whichever process comes first."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill the folder, unless a process has done so already; the folder appears whole."""
    with _locked(folder):
        if not folder.exists():
            partial = _emptied(folder.with_suffix(".partial"))
            build(partial)
            partial.rename(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of a machine prepares, the others wait for it and then find it done; a dead one holds no lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _emptied(folder: Path) -> Path:
    """What a process left that was killed while it prepared goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
