"""Stacks of a process that hangs: taken by a signal, so that it works while every thread is stuck in C.

faulthandler's handler runs in the signal itself and needs neither the interpreter lock nor memory.
"""

from __future__ import annotations

import faulthandler
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STACKS_SIGNAL = signal.SIGUSR1
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)')
WAITING_PLACES = ("/torch/distributed/", "/torch/autograd/graph.py", "/finetune_trainer/collectives.py")
"""Where the interpreter is while it waits for peers: in a collective, in the backward pass, whose reductions run below
it, or for those that still prepare."""
NOT_WAITING = ("/torch/distributed/checkpoint/", "/torch/distributed/elastic/")
OWN = "/finetune_trainer/"


@dataclass(frozen=True)
class Frame:
    """One call in a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


def stacks_file(scratch: Path, rank: int) -> Path:
    """Where a rank's stacks are written."""
    return scratch / "stalls" / f"rank-{rank}.txt"


def answer_with_stacks(file: Path, rank: int) -> IO[str]:
    """From now on the signal makes this process write the stacks of all its threads into the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = file.open("w")
    opened.write(f"rank {rank}, main thread 0x{threading.main_thread().ident or 0:016x}\n")
    opened.flush()
    faulthandler.register(STACKS_SIGNAL, file=opened, all_threads=True)
    return opened


def main_stack(text: str) -> list[Frame]:
    """The main thread's frames, newest first; none where the text has no such thread."""
    ident = re.search(r"main thread (0x[0-9a-f]+)", text)
    if ident is None:
        return []
    # The last one: a process may have been asked before.
    _, found, rest = text.rpartition(f"hread {ident[1]} (most recent call first):")
    block = rest.split("\n\n")[0] if found else ""
    matches = (FRAME.search(line) for line in block.splitlines())
    return [Frame(it["file"], int(it["line"]), it["function"]) for it in matches if it]


def waits_for_peers(stack: list[Frame]) -> bool:
    """Whether the process does nothing but wait for others in a collective."""
    if not stack:
        return False
    newest = stack[0].file
    return any(part in newest for part in WAITING_PLACES) and not any(part in newest for part in NOT_WAITING)


def place(stack: list[Frame]) -> str:
    """Where it hangs, in words: the newest call, and the newest one of our own code."""
    if not stack:
        return "an unknown place"
    own = next((frame for frame in stack if OWN in frame.file and not frame.file.endswith("/worker.py")), None)
    return str(stack[0]) if own in (None, stack[0]) else f"{stack[0]}, called by {own}"
