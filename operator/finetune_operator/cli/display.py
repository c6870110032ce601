"""What the user of `finetune run` sees while it runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
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
COLOURS = {"Succeeded": "green", "Failed": "red", "Restarting": "yellow", "Suspended": "yellow"}


class Display(Protocol):
    """Shows a job's status again and again, and what else is to be said."""

    def show(self, job: Object) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...


def make_display(stream: TextIO) -> Display:
    """The one that fits the stream."""
    return LiveDisplay(Console(file=stream)) if stream.isatty() else PlainDisplay(stream)


class PlainDisplay:
    """A line for each phase or reason, and one for progress now and then. No control characters."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, line_seconds: float = LINE_SECONDS
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._line_seconds = line_seconds
        self._seen: tuple[str, str] | None = None
        self._last_line = 0.0

    def show(self, job: Object) -> None:
        status = job.get("status") or {}
        seen = (status.get("phase") or "", status.get("reason") or "")
        if seen[0] and seen != self._seen:
            self._seen = seen
            self._line(f"{seen[0]:<10} {status.get('message') or ''}")
        elif self._clock() - self._last_line >= self._line_seconds and numbers(status):
            self._line(f"{seen[0]:<10} {numbers(status)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self.say(f"{datetime.now():%H:%M:%S} {text.rstrip()}")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        return


class LiveDisplay:
    """A bar with the newest figures at the bottom; phases that are over stand above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._phase = ""

    def show(self, job: Object) -> None:
        status = job.get("status") or {}
        phase = status.get("phase") or ""
        if phase and phase != self._phase:
            self._phase = phase
            self._console.print(_headline(status), highlight=False)
        self._live.update(_bar(job, status))

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()


def _headline(status: dict[str, Any]) -> Text:
    phase = status["phase"]
    text = Text.assemble((f"{phase:<10} ", f"bold {COLOURS.get(phase, 'cyan')}"), status.get("message") or "")
    return Text.assemble((f"{datetime.now():%H:%M:%S} ", "dim"), text)


def _bar(job: Object, status: dict[str, Any]) -> Group:
    progress = status.get("progress") or {}
    total = progress.get("totalSteps")
    bar = ProgressBar(total=total, completed=progress.get("step") or 0, pulse=not total, width=40)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(job["metadata"]["name"], style="bold"), bar, Text(numbers(status)))
    return Group(grid, Text(status.get("message") or "", style="dim", overflow="ellipsis", no_wrap=True))
