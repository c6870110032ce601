"""What the user of `finetune run` sees while it runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_operator.cli.table import numbers
from finetune_operator.cluster.port import Object

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal: often enough to see life, seldom enough for a log."""
COLOURS = {"Succeeded": "green", "Failed": "red", "Restarting": "yellow", "Suspended": "yellow", "Blocked": "yellow"}


class Display(Protocol):
    """Shows a job's status again and again, and what else is to be said."""

    def show(self, job: Object) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...


def make_display(stream: TextIO, names: Sequence[str]) -> Display:
    """The one that fits the stream.

    Args:
        names: of the jobs that are shown; where there are several, each line says of which it speaks.
    """
    return LiveDisplay(Console(file=stream), names) if stream.isatty() else PlainDisplay(stream, names)


def _prefix(names: Sequence[str], job: Object) -> str:
    width = max(map(len, names), default=0)
    return f"{job['metadata']['name']:<{width}}  " if len(names) > 1 else ""


class PlainDisplay:
    """A line for each phase or reason, and one for progress now and then. No control characters."""

    def __init__(
        self,
        stream: TextIO,
        names: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self._stream = stream
        self._names = names
        self._clock = clock
        self._line_seconds = line_seconds
        self._seen: dict[str, tuple[str, str]] = {}
        self._last_line: dict[str, float] = {}

    def show(self, job: Object) -> None:
        status, name = job.get("status") or {}, job["metadata"]["name"]
        seen = (status.get("phase") or "", status.get("reason") or "")
        due = self._clock() - self._last_line.get(name, 0.0) >= self._line_seconds
        if seen[0] and seen != self._seen.get(name):
            self._seen[name] = seen
            self._line(job, f"{seen[0]:<10} {status.get('message') or ''}")
        elif due and numbers(status):
            self._line(job, f"{seen[0]:<10} {numbers(status)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _line(self, job: Object, text: str) -> None:
        self._last_line[job["metadata"]["name"]] = self._clock()
        self.say(f"{datetime.now():%H:%M:%S} {_prefix(self._names, job)}{text.rstrip()}")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        return


class LiveDisplay:
    """A bar for each job with its newest figures at the bottom; phases that are over stand above them."""

    def __init__(self, console: Console, names: Sequence[str] = ()) -> None:
        self._console = console
        self._names = names
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._phases: dict[str, str] = {}
        self._bars: dict[str, Group] = {}

    def show(self, job: Object) -> None:
        status, name = job.get("status") or {}, job["metadata"]["name"]
        phase = status.get("phase") or ""
        if phase and phase != self._phases.get(name):
            self._phases[name] = phase
            self._console.print(_headline(status, _prefix(self._names, job)), highlight=False)
        self._bars[name] = _bar(job, status)
        self._live.update(Group(*self._bars.values()))

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()


def _headline(status: dict[str, Any], prefix: str) -> Text:
    phase = status["phase"]
    text = Text.assemble((f"{phase:<10} ", f"bold {COLOURS.get(phase, 'cyan')}"), status.get("message") or "")
    return Text.assemble((f"{datetime.now():%H:%M:%S} ", "dim"), prefix, text)


def _bar(job: Object, status: dict[str, Any]) -> Group:
    progress = status.get("progress") or {}
    total = progress.get("totalSteps")
    bar = ProgressBar(total=total, completed=progress.get("step") or 0, pulse=not total, width=40)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(job["metadata"]["name"], style="bold"), bar, Text(numbers(status)))
    return Group(grid, Text(status.get("message") or "", style="dim", overflow="ellipsis", no_wrap=True))
