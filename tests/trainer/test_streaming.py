"""Jobs over streams: nothing on disk, and a run that is killed goes on with exactly the samples that come next."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.contract import Result
from finetune_api.job import FineTuneJob
from finetune_trainer.data import order
from finetune_trainer.errors import DataError, StoppedError, UsageError
from tests.support.jobs import a_context, a_job, rows_of, run, write_rows
from tests.support.models import greetings
from tests.support.torchrun import torchrun
from tests.trainer import stream_ranks
from tests.trainer.stopping import StopsAt

ROOT = Path(__file__).parents[2]
STEPS = 9
"""Of 2 * 2 samples each: 36 of 24 rows, so that the second epoch begins in step 7."""


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_ROWS", 5)


def streamed(root: Path, task: str = "Instruction", **spec: Any) -> FineTuneJob:
    """A job that streams three files, one of them compressed, with held-out rows of their own."""
    rows = list(greetings(24))
    if task == "CausalLM":
        rows = [{"text": f"Row {n}: " + "the quick brown fox jumps. " * (1 + n % 4)} for n in range(24)]
    for name, part in (("a", rows[:9]), ("c", rows[9:])):
        write_rows(root / "data" / "train" / f"{name}.jsonl", part[:10])
    packed = "".join(json.dumps(row) + "\n" for row in rows[19:])
    (root / "data" / "train" / "b.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    held_out = write_rows(root / "data" / "held-out.jsonl", rows[:4])
    parts: dict[str, dict[str, Any]] = {
        "dataset": {
            "uri": f"file://{root}/data/train/",
            "streaming": True,
            "validation": {"uri": f"file://{held_out}"},
        },
        "hyperparameters": {
            "maxSteps": STEPS,
            "dropout": 0.1,
            "gradientAccumulationSteps": 2,
            "perDeviceBatchSize": 2,
            "maxLength": 64 if task == "CausalLM" else 128,
        },
        "checkpoint": {"everySteps": 3},
    }
    for part, fields in spec.items():
        parts[part] = parts.get(part, {}) | fields
    return a_job(root, "LoRA", task, **parts)


def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "out/report/report.json").read_text())


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / f"out/checkpoints/step-{STEPS:08}/trainable.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def attempt(job: FineTuneJob, root: Path, number: int, **stop: Any) -> Result:
    context = a_context(job, root / f"scratch-{number}", number)
    if stop:
        object.__setattr__(context, "reporter", StopsAt(context.stop, **stop))
    return run(job, context.scratch, number, context)


def test_a_stream_is_learned_and_nothing_of_it_is_on_disk(tmp_path: Path) -> None:
    job = streamed(tmp_path, hyperparameters={"maxSteps": 24, "dropout": None})
    result = run(job, tmp_path / "scratch")
    assert result.steps == 24
    assert result.epochs == pytest.approx(4.0, abs=0.05)
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] - 1
    assert result.samples
    found = report(tmp_path)["data"]
    assert found["format"] == "messages"
    assert found["training"]["rows"] == 96
    assert found["training"]["sample"].count("[[") == 1
    assert found["rows"] == {"training": 96, "validation": 4}
    names = [path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert "validation.arrow" in names
    assert not [name for name in names if name.startswith(("training", "a.jsonl", "b.jsonl", "c.jsonl"))]


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "conversations": ({}, (4, 8)),
    "split texts": ({"task": "CausalLM"}, (4,)),
    "with processes beside": ({"hyperparameters": {"dataWorkers": 2}}, (8,)),
}
"""What is streamed, and after which steps the run is stopped."""


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_goes_on_bit_by_bit(tmp_path: Path, case: str) -> None:
    spec, stops = CASES[case]
    expected = attempt(streamed(tmp_path / "one", **spec), tmp_path / "one", 1)
    job = streamed(tmp_path / "two", **spec)
    for number, step in enumerate(stops, start=1):
        with pytest.raises(StoppedError):
            attempt(job, tmp_path / "two", number, step=step)
    found = attempt(job, tmp_path / "two", 9)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert (found.metrics, found.tokens, found.epochs) == (expected.metrics, expected.tokens, expected.epochs)
    one, two = (report(tmp_path / name)["data"]["training"] for name in ("one", "two"))
    assert one == two


def test_dropped_rows_are_counted_over_all_attempts(tmp_path: Path) -> None:
    outcomes = []
    for name, steps in (("one", ()), ("two", (5,))):
        job = streamed(tmp_path / name, dataset={"onInvalidRow": "Drop"})
        path = tmp_path / name / "data/train/a.jsonl"
        path.write_text('not JSON\n{"messages": []}\n' + path.read_text())
        for number, step in enumerate(steps, start=1):
            with pytest.raises(StoppedError):
                attempt(job, tmp_path / name, number, step=step)
        attempt(job, tmp_path / name, 9)
        outcomes.append((weights(tmp_path / name), report(tmp_path / name)))
    (one, first), (two, second) = outcomes
    assert same(one, two)
    dropped = first["data"]["training"]["dropped"]
    assert dropped["count"] == second["data"]["training"]["dropped"]["count"] >= 2
    assert any(text.startswith("training: ") and "rows were dropped" in text for text in first["warnings"])


def killed_and_resumed(job: FineTuneJob, folder: Path, environ: dict[str, str], step: int) -> None:
    """Run the job in a process that is killed after a step, and again in one that is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator", "trainer_image"))
    for number, kill in ((1, step), (2, 0)):
        command = [sys.executable, "-m", "tests.trainer.killed", str(folder), str(number), str(kill)]
        done = subprocess.run(
            command, env=os.environ | environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        assert done.returncode == (-9 if kill else 0), done.stderr[-3000:]


def test_a_run_that_is_killed_within_a_window_goes_on_bit_by_bit(tmp_path: Path) -> None:
    attempt(streamed(tmp_path / "one"), tmp_path / "one", 1)
    killed_and_resumed(streamed(tmp_path / "two"), tmp_path / "two" / "run", {}, step=8)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def to_bucket(job: FineTuneJob, root: Path, client: Any, bucket: str) -> FineTuneJob:
    """The same job with its data in a bucket; the model and the output stay where they are."""
    for path in (root / "data").rglob("*.jsonl*"):
        client.upload_file(str(path), bucket, path.relative_to(root / "data").as_posix())
    wire = job.to_wire()
    wire["spec"]["dataset"]["uri"] = f"s3://{bucket}/train/*"
    wire["spec"]["dataset"]["validation"]["uri"] = f"s3://{bucket}/held-out.jsonl"
    return FineTuneJob.from_wire(wire)


def test_a_run_over_a_bucket_that_is_killed_goes_on_bit_by_bit(tmp_path: Path, s3_server, bucket: str) -> None:
    attempt(streamed(tmp_path / "one"), tmp_path / "one", 1)
    job = to_bucket(streamed(tmp_path / "two"), tmp_path / "two", s3_server.client(), bucket)
    killed_and_resumed(job, tmp_path / "two" / "run", s3_server.environ(), step=8)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_wrong_row_fails_the_job_by_file_and_line_when_it_is_met(tmp_path: Path) -> None:
    job = streamed(tmp_path)
    path = tmp_path / "data/train/c.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]) + '{"messages": []}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:10: messages is empty"):
        run(job, tmp_path / "scratch")


def test_a_stream_without_held_out_rows_is_trained_and_delivered(tmp_path: Path) -> None:
    job = streamed(tmp_path, dataset={"validation": None}, hyperparameters={"maxSteps": 2})
    result = run(job, tmp_path / "scratch")
    assert (result.steps, result.metrics, result.samples) == (2, {}, [])


@pytest.mark.parametrize("task", ["SequenceClassification", "Regression"])
def test_labelled_texts_are_streamed_and_go_on_bit_by_bit(tmp_path: Path, task: str) -> None:
    outcomes = []
    for name, stops in (("one", ()), ("two", (5,))):
        root = tmp_path / name
        held_out = write_rows(root / "data" / "held-out.jsonl", islice(rows_of(task), 12))
        labels = {"labels": ["c", "b", "a"]} if task == "SequenceClassification" else {}
        dataset = {"streaming": True, "validation": {"uri": f"file://{held_out}"}}
        hyperparameters = {"maxSteps": STEPS, "perDeviceBatchSize": 4, "dropout": 0.1}
        parts = {"dataset": dataset, "hyperparameters": hyperparameters, "task": labels}
        job = a_job(root, "Full", task, **parts)
        for number, step in enumerate(stops, start=1):
            with pytest.raises(StoppedError):
                attempt(job, root, number, step=step)
        result = attempt(job, root, 9)
        assert result.metrics["eval_loss"] < result.baseline["eval_loss"]
        assert report(root)["data"]["training"]["rows"] == STEPS * 4
        outcomes.append((weights(root), result.metrics))
    assert same(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


def test_a_stream_without_max_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"spec\.hyperparameters\.maxSteps: how long a stream is shows only at its end"
    ):
        run(streamed(tmp_path, hyperparameters={"maxSteps": None}), tmp_path / "scratch")


def losses(folder: Path, ranks: int, start: int, stop: int) -> list[float]:
    """Of the steps after `start` of a run over so many processes."""
    printed = torchrun(stream_ranks, folder, start, stop, ranks=ranks)
    return json.loads(printed.splitlines()[-1])["losses"]


@pytest.mark.slow
def test_processes_share_a_stream_and_go_on_in_another_number(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 4)):
        rows = [{"text": f"{name} {n} " + "what is the answer " * (n % 4)} for n in range(count)]
        write_rows(tmp_path / "one/data" / f"{name}.jsonl", [*rows, {"text": ""}])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    alone = losses(tmp_path / "one", 1, 0, 8)
    together = losses(tmp_path / "two", 2, 0, 4)
    assert together == pytest.approx(alone[:4], rel=1e-4)
    assert losses(tmp_path / "two", 2, 4, 6) == pytest.approx(alone[4:6], rel=1e-4)
    assert losses(tmp_path / "two", 1, 6, 8) == pytest.approx(alone[6:], rel=1e-4)
