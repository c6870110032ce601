"""Jobs as `kubectl get` shows them, and their progress as one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from finetune_operator.cluster.port import Object

HEADER = ("NAME", "STRATEGY", "PHASE", "STEP", "LOSS", "ETA", "RESTARTS", "AGE")


def table(jobs: Sequence[Object], now: datetime) -> str:
    """The columns of the CRD."""
    rows = [HEADER, *(_row(job, now) for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def age(since: str, now: datetime) -> str:
    """As kubectl writes ages: `42s`, `5m`, `3h`, `2d`."""
    seconds = max(0, int((now.astimezone(UTC) - datetime.fromisoformat(since)).total_seconds()))
    for unit, length, least in (("d", 86400, 2 * 86400), ("h", 3600, 2 * 3600), ("m", 60, 2 * 60)):
        if seconds >= least:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def numbers(status: Mapping[str, Any]) -> str:
    """Progress in figures: `step 120/1000, loss 1.83, 812 tokens/s, ETA 1h23m`, without what is not known."""
    progress = status.get("progress") or {}
    parts = [
        ("step ", progress.get("steps"), ""),
        ("loss ", progress.get("loss"), ""),
        ("", progress.get("tokensPerSecond"), " tokens/s"),
        ("ETA ", progress.get("eta"), ""),
    ]
    return ", ".join(f"{before}{value}{after}" for before, value, after in parts if value)


def _row(job: Object, now: datetime) -> tuple[str, ...]:
    status = job.get("status") or {}
    progress = status.get("progress") or {}
    return (
        job["metadata"]["name"],
        job["spec"]["strategy"]["type"],
        status.get("phase") or "",
        progress.get("steps") or "",
        progress.get("loss") or "",
        progress.get("eta") or "",
        str((status.get("restarts") or {}).get("total", "")),
        age(job["metadata"]["creationTimestamp"], now),
    )
