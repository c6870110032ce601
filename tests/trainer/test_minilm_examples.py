"""The examples on a real encoder: their data is real and large enough, and a part of it is already learned well."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import pytest
import yaml

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from tests.support.jobs import run, write_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("text-classification", "regression")


@pytest.fixture(scope="module")
def rows():
    return {name: runpy.run_path(str(EXAMPLES / name / "data.py"))["rows"]() for name in NAMES}


def test_every_text_is_there_once_and_there_are_thousands(rows):
    assert all(len(found) > 4000 for found in rows.values())
    assert all(len({row["text"] for row in found}) == len(found) for found in rows.values())


def test_no_area_is_rare_and_none_is_most_of_the_data(rows):
    counts = Counter(row["label"] for row in rows["text-classification"])
    total = sum(counts.values())
    assert len(counts) == 8
    assert 0.03 < min(counts.values()) / total < max(counts.values()) / total < 0.35


def a_part_of(example: str, rows: list, rate: float, steps: int, root: Path) -> FineTuneJob:
    """The example's job over some of its rows, for some of its steps, in folders."""
    wire = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
    spec = wire["spec"]
    spec["model"]["uri"] = f"file://{runpy.run_path(str(EXAMPLES / 'minilm.py'))['model']()}"
    spec["dataset"]["uri"] = f"file://{write_rows(root / 'rows.jsonl', rows[:900])}"
    spec["output"]["uri"] = f"file://{root}/out"
    spec["hyperparameters"] |= {"maxSteps": steps, "maxLength": 32, "learningRate": rate}
    return resolve(FineTuneJob.from_wire(wire))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "rate", "steps", "metric", "more"),
    [
        ("text-classification/full", 3e-4, 40, "eval_accuracy", 0.2),
        ("text-classification/layer-norm", 1e-2, 80, "eval_accuracy", 0.15),
        ("regression/full", 3e-4, 40, "eval_r2", 0.05),
    ],
)
def test_a_part_of_it_is_learned_well_beyond_the_plainest_guess(tmp_path, rows, example, rate, steps, metric, more):
    result = run(a_part_of(example, rows[example.split("/")[0]], rate, steps, tmp_path), tmp_path / "scratch")
    assert result.metrics[metric] > result.baseline[metric] + more
