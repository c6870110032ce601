"""What the run is doing now: kept by rank 0's training thread, read by the progress server, the log and the agent."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.contract import MAX_WARNING, MAX_WARNINGS, Progress, Stage
from finetune_trainer.heartbeat import Heartbeat

WINDOW = 128
"""Samples over which speed is measured: long enough to hold an evaluation, short enough to be about now."""
LOG_SECONDS = 1.0
FILE_SECONDS = 5.0


class Sample(NamedTuple):
    """Where this attempt was at a moment: seconds, optimizer steps (of all attempts), tokens (of this attempt)."""

    time: float
    step: int
    tokens: int | None = None


def eta_seconds(history: Sequence[Sample], total_steps: int | None) -> int | None:
    """Seconds until the last step at the pace of `history`; None while it has no pace.

    Only differences count, so the steps of earlier attempts do not make this one look faster than it is.
    """
    if total_steps is None or len(history) < 2:
        return None
    elapsed, steps = history[-1].time - history[0].time, history[-1].step - history[0].step
    if elapsed <= 0 or steps <= 0:
        return None
    return math.ceil(max(0, total_steps - history[-1].step) * elapsed / steps)


def tokens_per_second(history: Sequence[Sample]) -> float | None:
    """Tokens a second over `history`, or None while that is not known."""
    counted = [sample for sample in history if sample.tokens is not None]
    if len(counted) < 2 or counted[-1].time <= counted[0].time:
        return None
    return ((counted[-1].tokens or 0) - (counted[0].tokens or 0)) / (counted[-1].time - counted[0].time)


class Reporter:
    """Thread-safe progress of this rank.

    Args:
        attempt: the number of this incarnation.
        rank: only rank 0 writes log lines and the progress file.
        file: where the agent finds the last state of a worker that was killed; None: nowhere.
        heartbeat: counts the signs of life for the agent, which ends ranks that give none.
    """

    def __init__(
        self, attempt: int = 1, rank: int = 0, file: Path | None = None, heartbeat: Heartbeat | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._progress = Progress(attempt=attempt, updated_at=_now())
        self._history: deque[Sample] = deque(maxlen=WINDOW)
        self._rank = rank
        self._file = file if rank == 0 else None
        self._heartbeat = heartbeat
        self._beaten = time.monotonic()
        self._logged = self._written = -math.inf

    def stage(self, stage: Stage, detail: str = "") -> None:
        """Enter a stage, or say more about the one that goes on (`detail`, cut at 256 characters)."""
        self.beat()
        with self._lock:
            entered = stage is not self._progress.stage
            self._apply({"stage": stage, "detail": detail})
        if entered:
            self._log(f"{stage.value}{f': {detail}' if detail else ''}")
            self._write_file(force=True)

    def update(self, *, tokens: int | None = None, **fields: Any) -> None:
        """Set fields of `Progress`; numbers that are not finite count as unknown.

        Args:
            tokens: tokens that this attempt has learned from so far; gives tokens_per_second.
            fields: any of Progress; tokens_per_second and eta_seconds are worked out where they are not given.

        Raises:
            TypeError: Progress has no such field.
        """
        if unknown := fields.keys() - Progress.model_fields.keys():
            raise TypeError(f"Progress has no field {', '.join(sorted(unknown))}")
        if threading.current_thread() is threading.main_thread():
            # The upload's thread reports too, and would hide that the training hangs.
            self.beat()
        with self._lock:
            if "step" in fields:
                fields = self._pace(int(fields["step"]), tokens, fields) | fields
            self._apply(fields)
        if fields.get("loss") is not None:
            self._log_step()
        self._write_file(force="checkpoint" in fields)

    def beat(self) -> None:
        """A sign of life of the training thread; without one for long the run counts as stalled."""
        self._beaten = time.monotonic()
        if self._heartbeat is not None:
            self._heartbeat.beat()

    def warn(self, text: str) -> None:
        """Add a warning for the user, once; the oldest make room."""
        text = text[:MAX_WARNING]
        with self._lock:
            if text in self._progress.warnings:
                return
            self._apply({"warnings": [*self._progress.warnings, text][-MAX_WARNINGS:]})
        print(f"{_clock()} warning: {text}", file=sys.stderr, flush=True)
        self._write_file(force=True)

    def snapshot(self) -> Progress:
        """A copy of the present state, with the age of the heartbeat."""
        with self._lock:
            age = round(time.monotonic() - self._beaten, 1)
            return self._progress.model_copy(deep=True, update={"heartbeat_age_seconds": age})

    def save(self) -> None:
        """Leave the present state for the agent, which tells it in the pod's last word."""
        self._write_file(force=True)

    def _apply(self, fields: dict[str, Any]) -> None:
        """With the lock held. Validation turns the numbers of numpy and torch into plain ones."""
        clean = {name: _finite(value) for name, value in fields.items()}
        if "detail" in clean:
            clean["detail"] = clean["detail"][:256]
        merged = {**dict(self._progress), **clean, "updated_at": _now()}
        self._progress = Progress.model_validate(merged)

    def _pace(self, step: int, tokens: int | None, fields: dict[str, Any]) -> dict[str, Any]:
        if self._history and step < self._history[-1].step:
            self._history.clear()
        self._history.append(Sample(time.monotonic(), step, tokens))
        total = fields.get("total_steps", self._progress.total_steps)
        pace = {"eta_seconds": eta_seconds(self._history, total), "tokens_per_second": tokens_per_second(self._history)}
        return {name: value for name, value in pace.items() if value is not None}

    def _log_step(self) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._log(describe(self.snapshot()))

    def _log(self, line: str) -> None:
        if self._rank == 0:
            print(f"{_clock()} {line}", file=sys.stderr, flush=True)

    def _write_file(self, force: bool) -> None:
        now = time.monotonic()
        if self._file is None or (not force and now - self._written < FILE_SECONDS):
            return
        self._written = now
        temporary = self._file.with_suffix(".tmp")
        try:
            temporary.write_text(self.snapshot().model_dump_json(exclude_none=True))
            os.replace(temporary, self._file)
        except OSError as error:
            # Only the agent's last word gets poorer by it; on a full disk the training thread says more itself.
            print(f"{_clock()} cannot write {self._file}: {error}", file=sys.stderr, flush=True)


def read_progress(file: Path) -> Progress | None:
    """What rank 0 wrote last, or None."""
    try:
        return Progress.model_validate_json(file.read_text())
    except (OSError, ValueError):
        return None


def describe(progress: Progress) -> str:
    """One line for people: `step 120/1000  loss 1.83  lr 2.0e-04  5,210 tok/s  ETA 0:12:30`."""
    total = f"/{progress.total_steps}" if progress.total_steps else ""
    parts = [f"step {progress.step}{total}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.learning_rate is not None:
        parts.append(f"lr {progress.learning_rate:.1e}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.eta_seconds is not None:
        minutes, seconds = divmod(progress.eta_seconds, 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return "  ".join(parts)


def _finite(value: Any) -> Any:
    """JSON has no infinities: such a number is left out rather than making the whole message unreadable."""
    if isinstance(value, dict):
        return {key: float(number) for key, number in value.items() if math.isfinite(float(number))}
    if hasattr(value, "__float__") and not isinstance(value, (int, str)):
        return float(value) if math.isfinite(float(value)) else None
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _clock() -> str:
    return datetime.now().strftime("%H:%M:%S")
