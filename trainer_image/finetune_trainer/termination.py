"""The last word of a pod: a TerminationMessage that always is valid JSON and always fits."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from finetune_api import contract
from finetune_api.contract import MAX_TERMINATION_BYTES, Progress, Result, TerminationMessage
from finetune_trainer.causes import CauseRecord

FEW_WARNINGS = 3
MAX_METRICS = 8
LOG_CHARACTERS = 1500
SHORT_LOG_CHARACTERS = 400
"""What is kept of each set of metrics when room is short; the bucket's result.json has all of them."""


def failure_message(cause: CauseRecord, attempt: int, reached: Progress | None) -> TerminationMessage:
    """What the operator learns of a run that did not end with OK."""
    reached = reached or Progress()
    return TerminationMessage(
        exit_code=cause.exit_code,
        cause=contract.CAUSE_OF_EXIT_CODE[cause.exit_code],
        message=cause.message,
        advice=cause.advice,
        log=cause.traceback[-LOG_CHARACTERS:],
        rank=cause.rank,
        attempt=attempt,
        step=reached.step,
        checkpoint=reached.checkpoint,
        metrics=reached.metrics,
        warnings=reached.warnings,
    )


def success_message(result: Result | None, attempt: int, reached: Progress | None = None) -> TerminationMessage:
    """What the operator learns of a pod that ended with OK: on index 0 the result, less the samples (too large)."""
    if result is None:
        return TerminationMessage(exit_code=contract.ExitCode.OK, attempt=attempt)
    return TerminationMessage(
        exit_code=contract.ExitCode.OK,
        attempt=attempt,
        step=result.steps,
        checkpoint=result.checkpoint,
        warnings=reached.warnings if reached else [],
        result=result.model_copy(update={"samples": []}),
    )


def encode(message: TerminationMessage) -> bytes:
    """UTF-8 JSON of at most MAX_TERMINATION_BYTES: what is least missed goes first, and never half a value."""
    message = _finite(message)
    for shorten in SHORTER:
        message = shorten(message)
        data = message.model_dump_json(by_alias=True, exclude_none=True).encode()
        if len(data) <= MAX_TERMINATION_BYTES:
            return data
    bare = message.model_copy(update={"result": None, "metrics": {}, "checkpoint": None, "warnings": [], "log": ""})
    return bare.model_dump_json(by_alias=True, exclude_none=True).encode()


def write_termination(message: TerminationMessage) -> None:
    """Write it where the kubelet (or the local adaptor) looks; without such a place the log must do."""
    path = Path(os.environ.get(contract.ENV_TERMINATION_LOG, contract.TERMINATION_LOG))
    try:
        path.write_bytes(encode(message))
    except OSError as error:
        print(f"cannot write the termination message to {path}: {error}", file=sys.stderr, flush=True)


def _finite(message: TerminationMessage) -> TerminationMessage:
    changes: dict[str, object] = {"metrics": _finite_numbers(message.metrics)}
    if message.result is not None:
        numbers = {
            "metrics": _finite_numbers(message.result.metrics),
            "baseline": _finite_numbers(message.result.baseline),
        }
        changes["result"] = message.result.model_copy(update=numbers)
    return message.model_copy(update=changes)


def _finite_numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _unchanged(message: TerminationMessage) -> TerminationMessage:
    return message


def _without_versions(message: TerminationMessage) -> TerminationMessage:
    return _with_result(message, versions={})


def _shorter_log(message: TerminationMessage) -> TerminationMessage:
    """The end of a traceback names the error and its place."""
    return message.model_copy(update={"log": message.log[-SHORT_LOG_CHARACTERS:]})


def _without_log(message: TerminationMessage) -> TerminationMessage:
    return message.model_copy(update={"log": ""})


def _fewer_warnings(message: TerminationMessage) -> TerminationMessage:
    """Whole ones: by its text the operator knows which it has told already."""
    return message.model_copy(update={"warnings": message.warnings[-FEW_WARNINGS:]})


def _without_warnings(message: TerminationMessage) -> TerminationMessage:
    return message.model_copy(update={"warnings": []})


def _fewer_metrics(message: TerminationMessage) -> TerminationMessage:
    if message.result is not None:
        few = {"metrics": _few(message.result.metrics), "baseline": _few(message.result.baseline)}
        message = _with_result(message, **few)
    return message.model_copy(update={"metrics": _few(message.metrics)})


def _few(metrics: dict[str, float]) -> dict[str, float]:
    return {name[:64]: value for name, value in list(metrics.items())[:MAX_METRICS]}


def _shorter_words(message: TerminationMessage) -> TerminationMessage:
    return message.model_copy(update={"message": _cut(message.message, 800), "advice": _cut(message.advice, 400)})


def _much_shorter_words(message: TerminationMessage) -> TerminationMessage:
    return message.model_copy(update={"message": _cut(message.message, 240), "advice": _cut(message.advice, 120)})


SHORTER = (
    *(_unchanged, _without_versions, _shorter_log, _fewer_warnings, _fewer_metrics, _without_log, _without_warnings),
    *(_shorter_words, _much_shorter_words),
)
"""One after the other, until it fits."""


def _cut(text: str, length: int) -> str:
    """Both ends say most: what happened stands first, the place in the code last."""
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _with_result(message: TerminationMessage, **changes: object) -> TerminationMessage:
    if message.result is None:
        return message
    return message.model_copy(update={"result": message.result.model_copy(update=changes)})
