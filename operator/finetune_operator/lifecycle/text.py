"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from finetune_api.contract import Progress, Stage
from finetune_api.status import ProgressStatus

STAGE_WORDS = {
    Stage.STARTING: "The trainer is starting",
    Stage.RENDEZVOUS: "The pods are finding each other",
    Stage.DOWNLOADING: "Downloading model and data",
    Stage.PREPARING: "Preparing the data",
    Stage.LOADING: "Loading the model",
    Stage.TRAINING: "Training",
    Stage.EVALUATING: "Evaluating",
    Stage.SAVING: "Saving a checkpoint",
    Stage.EXPORTING: "Writing and checking the result",
    Stage.FINISHED: "The trainer is done",
}


def number(value: float | None, digits: int = 4) -> str | None:
    """With so many significant digits: 1.834, 2e-05."""
    return None if value is None else f"{value:.{digits}g}"


def numbers(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in values.items()}


def duration(seconds: int | None) -> str | None:
    """The two largest units: 45s, 12m30s, 1h23m, 2d3h."""
    if seconds is None:
        return None
    minutes, rest = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def count(pods: int) -> str:
    return f"{pods} pod" if pods == 1 else f"{pods} pods"


def progress_status(progress: Progress, now: str) -> ProgressStatus:
    """The trainer's numbers for status; now: RFC 3339."""
    total, step = progress.total_steps, progress.step
    rate = progress.tokens_per_second
    return ProgressStatus(
        stage=progress.stage.value,
        step=step,
        total_steps=total,
        percent=math.floor(100 * step / total) if total else None,
        steps=f"{step}/{total}" if total else (str(step) if step else None),
        epoch=None if progress.epoch is None else f"{progress.epoch:.2f}",
        loss=number(progress.loss),
        learning_rate=number(progress.learning_rate, 3),
        tokens_per_second=None if rate is None else (f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"),
        eta_seconds=progress.eta_seconds,
        eta=duration(progress.eta_seconds),
        updated_at=now,
    )


def progress_sentence(progress: Progress) -> str:
    """What the trainer is doing now."""
    words = STAGE_WORDS[progress.stage]
    if progress.stage is Stage.TRAINING and progress.total_steps:
        loss = f", loss {number(progress.loss)}" if progress.loss is not None else ""
        eta = f", {duration(progress.eta_seconds)} left" if progress.eta_seconds is not None else ""
        words = f"Training: step {progress.step}/{progress.total_steps}{loss}{eta}"
    elif progress.detail:
        words = f"{words}: {progress.detail}"
    return warned(words, progress.warnings)


EVENT_CHARACTERS = 1024
"""What the API server takes of an event's message."""


def with_log(sentence: str, log: str) -> str:
    """A sentence with the last lines of a log, as many as fit into an event."""
    room = EVENT_CHARACTERS - len(sentence) - 2
    lines = log.strip().splitlines()
    while lines and len("\n".join(lines)) > room:
        lines.pop(0)
    return "\n".join([f"{sentence}:", *lines]) if lines else sentence


def warned(sentence: str, warnings: Sequence[str]) -> str:
    """The sentence with the newest warning; all of them stand in status.warnings."""
    if not warnings:
        return sentence
    which = "warning" if len(warnings) == 1 else f"{len(warnings)} warnings, the last"
    return f"{sentence} ({which}: {warnings[-1]})"
