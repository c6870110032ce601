"""The last word always fits and always parses."""

from __future__ import annotations

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.contract import MAX_TERMINATION_BYTES, OutputRef, Progress, Result, TerminationMessage
from finetune_trainer.causes import CauseRecord, Kind
from finetune_trainer.termination import encode, failure_message, success_message

WORDS = st.text(max_size=6000)
METRICS = st.dictionaries(st.text(min_size=1, max_size=200), st.floats(), max_size=60)


@settings(max_examples=60, deadline=None)
@given(message=WORDS, advice=WORDS, metrics=METRICS)
def test_any_failure_fits(message: str, advice: str, metrics: dict[str, float]) -> None:
    cause = CauseRecord(kind=Kind.OWN, exit_code=70, message=message, advice=advice)
    data = encode(failure_message(cause, 2, Progress(step=5, metrics=metrics)))
    assert len(data) <= MAX_TERMINATION_BYTES
    parsed = TerminationMessage.from_wire(json.loads(data))
    assert (parsed.exit_code, parsed.attempt, parsed.step) == (70, 2, 5)


def test_a_short_message_is_kept_whole() -> None:
    cause = CauseRecord(kind=Kind.OWN, exit_code=65, message="rows.jsonl:3 é", advice="mend it", rank=3)
    parsed = TerminationMessage.from_wire(json.loads(encode(failure_message(cause, 1, None))))
    assert (parsed.message, parsed.advice, parsed.rank) == ("rows.jsonl:3 é", "mend it", 3)


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    cause = CauseRecord(kind=Kind.OWN, exit_code=70, message="ValueError" + "x" * 9000 + "(in f, a.py:3)")
    parsed = TerminationMessage.from_wire(json.loads(encode(failure_message(cause, 1, None))))
    assert parsed.message.startswith("ValueError")
    assert parsed.message.endswith("(in f, a.py:3)")


def test_a_result_with_too_many_metrics_keeps_the_first_and_drops_what_is_not_finite() -> None:
    metrics = {"eval_loss": 1.5, "eval_nan": math.nan} | {f"eval_{i}_{'x' * 80}": float(i) for i in range(60)}
    output = OutputRef(uri="s3://b/out/adapter", kind="adapter")
    result = Result(job="j", output=output, steps=9, metrics=metrics, versions={"torch": "2" * 3000})
    data = encode(success_message(result, 1))
    assert len(data) <= MAX_TERMINATION_BYTES
    kept = TerminationMessage.from_wire(json.loads(data)).result
    assert kept is not None
    assert kept.output == output
    assert kept.metrics["eval_loss"] == 1.5
    assert "eval_nan" not in kept.metrics


@settings(max_examples=30, deadline=None)
@given(warnings=st.lists(st.text(max_size=512), max_size=16), message=WORDS)
def test_warnings_are_told_whole_and_the_newest_last(warnings: list[str], message: str) -> None:
    cause = CauseRecord(kind=Kind.OWN, exit_code=70, message=message)
    data = encode(failure_message(cause, 1, Progress(warnings=warnings)))
    assert len(data) <= MAX_TERMINATION_BYTES
    kept = TerminationMessage.from_wire(json.loads(data)).warnings
    assert kept == warnings[len(warnings) - len(kept) :]


def test_warnings_of_a_run_that_ended_well_are_in_its_last_word() -> None:
    result = Result(job="j", output=OutputRef(uri="s3://b/out/adapter", kind="adapter"), steps=9)
    warnings = [f"{number}: {'x' * 500}" for number in range(16)]
    few = TerminationMessage.from_wire(json.loads(encode(success_message(result, 1, Progress(warnings=warnings)))))
    assert few.warnings == warnings[-3:]
    all_ = TerminationMessage.from_wire(json.loads(encode(success_message(result, 1, Progress(warnings=["cut"])))))
    assert all_.warnings == ["cut"]


def test_the_end_of_the_traceback_goes_along_as_far_as_there_is_room() -> None:
    cause = CauseRecord(kind=Kind.OWN, exit_code=70, message="m", traceback="x" * 5000 + "KeyError")
    word = failure_message(cause, 1, None)
    assert word.log.endswith("KeyError")
    crowded = word.model_copy(update={"warnings": ["w" * 500] * 7})
    found = TerminationMessage.model_validate_json(encode(crowded))
    assert (found.log.endswith("KeyError"), len(found.log)) == (True, 400)
