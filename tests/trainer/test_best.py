"""The best step is kept, found again and delivered; training ends when nothing gets better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.contract import Stage
from finetune_trainer.errors import StoppedError
from finetune_trainer.progress import Reporter
from tests.support.jobs import a_context, a_job, run, write_rows
from tests.support.models import save_tiny_bert
from tests.trainer.test_labeled_text import a_labeled_job
from tests.trainer.test_resume import StopsAt

BEST, RISEN, LAST = 18, 12, 30
"""What this model does at this rate: the best step, the second evaluation in a row without improvement, the end."""


def an_overfitting_job(root: Path, strategy: str = "Full", patience: int | None = None, **spec):
    """Trains on numbers and is measured on other words: the held-out loss falls, rises, falls and rises for good."""

    def row(number: int, answer: str):
        question = {"role": "user", "content": f"Say {number}."}
        return {"messages": [question, {"role": "assistant", "content": answer}]}

    train = write_rows(root / "in/train.jsonl", [row(number, f"The number is {number}.") for number in range(8)])
    held_out = write_rows(root / "in/held.jsonl", [row(n, f"The word is {'zyxw'[n] * 3}.") for n in range(4)])
    evaluation = {"everySteps": 3, "samples": 0} | ({"earlyStopping": {"patience": patience}} if patience else {})
    hyperparameters = {"epochs": 100, "maxSteps": LAST, "learningRate": 1e-2, "scheduler": "constant", "warmupRatio": 0}
    return a_job(
        root,
        strategy,
        dataset={"uri": f"file://{train}", "validation": {"uri": f"file://{held_out}"}},
        hyperparameters=hyperparameters | spec.pop("hyperparameters", {}),
        evaluation=evaluation | spec.pop("evaluation", {}),
        checkpoint={"everySteps": 4, "keep": 1},
        **spec,
    )


def kept(root: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (root / "out/checkpoints").glob("*/manifest.json"))


def delivered(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "out/model/model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def report(root: Path) -> dict:
    return json.loads((root / "out/report/report.json").read_text())


def attempt(job, root: Path, number: int, **stop):
    context = a_context(job, root / f"scratch-{number}", number)
    if stop:
        object.__setattr__(context, "reporter", StopsAt(context.stop, **stop))
    return run(job, context.scratch, number, context)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, object]:
    """An undisturbed run to the last step."""
    root = tmp_path_factory.mktemp("whole")
    return root, run(an_overfitting_job(root), root / "scratch")


@pytest.fixture(scope="module")
def early(tmp_path_factory) -> tuple[Path, object]:
    """An undisturbed run with a patience of two evaluations."""
    root = tmp_path_factory.mktemp("early")
    return root, run(an_overfitting_job(root, patience=2), root / "scratch")


def test_the_best_step_is_delivered_and_not_the_last(whole):
    root, result = whole
    assert (result.steps, result.exported_step, result.stopped_early) == (LAST, BEST, "")
    assert equal(delivered(root), load_file(root / f"out/checkpoints/step-{BEST:08d}/trainable.safetensors"))


def test_the_metrics_are_those_of_what_is_delivered(whole):
    root, result = whole
    curve = {entry["step"]: entry["eval_loss"] for entry in report(root)["history"] if "eval_loss" in entry}
    assert list(curve) == list(range(3, LAST + 1, 3))
    assert result.metrics["eval_loss"] == curve[BEST] == min(curve.values())


def test_the_newest_and_the_best_checkpoints_are_kept(whole):
    root, _ = whole
    assert kept(root) == [BEST, LAST]
    manifest = json.loads((root / f"out/checkpoints/step-{LAST:08d}/manifest.json").read_text())
    assert manifest["best"] == BEST


def test_the_report_and_the_card_say_whose_weights_they_are(whole):
    root, _ = whole
    assert f"of step {BEST}" in (root / "out/report/index.html").read_text()
    assert f"The weights are those of step {BEST}." in (root / "out/model/README.md").read_text()


def test_losses_that_part_are_warned_of_once(whole):
    root, _ = whole
    (warning,) = report(root)["warnings"]
    assert "held-out loss has risen from 4.372 at step 6" in warning
    assert "evaluation.earlyStopping" in warning


def test_the_last_weights_are_delivered_on_request(tmp_path):
    result = run(an_overfitting_job(tmp_path, output={"weights": "Last"}), tmp_path / "scratch")
    assert (result.exported_step, kept(tmp_path)) == (LAST, [LAST])
    assert equal(delivered(tmp_path), load_file(tmp_path / f"out/checkpoints/step-{LAST:08d}/trainable.safetensors"))


def test_a_last_step_that_is_not_due_is_evaluated_too(tmp_path):
    job = an_overfitting_job(tmp_path, hyperparameters={"maxSteps": 4})
    assert run(job, tmp_path / "scratch").exported_step == 4
    assert [entry["step"] for entry in report(tmp_path)["history"] if "eval_loss" in entry] == [3, 4]


def test_an_adapter_is_taken_back_to_its_best_step_too(tmp_path):
    job = an_overfitting_job(tmp_path, "LoRA", lora={"dropout": 0, "modulesToSave": ["lm_head"]})
    result = run(job, tmp_path / "scratch")
    assert result.exported_step < result.steps
    best = load_file(tmp_path / f"out/checkpoints/step-{result.exported_step:08d}/trainable.safetensors")
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    names = {name: name.replace(".default.", ".").replace(".modules_to_save.", ".") for name in best}
    assert equal(adapter, {names[name]: tensor for name, tensor in best.items()})


def test_training_ends_early_and_delivers_the_best_step(early):
    root, result = early
    assert (result.steps, result.exported_step) == (RISEN, 6)
    assert result.stopped_early == "eval_loss did not improve in 2 evaluations"
    assert "12, stopped early: eval_loss did not improve" in (root / "out/report/index.html").read_text()
    assert kept(root) == [6, RISEN]


def test_a_smaller_improvement_than_min_delta_is_none(tmp_path):
    early = {"patience": 1, "minDelta": 0.5}
    result = run(an_overfitting_job(tmp_path, evaluation={"earlyStopping": early}), tmp_path / "scratch")
    assert (result.steps, result.exported_step) == (6, 6), "better than step 3, but not by enough to go on"


def test_a_metric_that_grows_is_the_better_the_larger_it_is(tmp_path):
    save_tiny_bert(tmp_path / "model")
    job = a_labeled_job(
        tmp_path,
        "Full",
        "classes",
        hyperparameters={"epochs": 30, "maxSteps": 60, "scheduler": "constant"},
        evaluation={"everySteps": 2, "earlyStopping": {"metric": "eval_accuracy", "patience": 3}},
    )
    result = run(job, tmp_path / "scratch")
    course = {
        entry["step"]: entry["eval_accuracy"] for entry in report(tmp_path)["history"] if "eval_accuracy" in entry
    }
    best = max(course.values())
    assert result.exported_step == min(step for step, value in course.items() if value == best)
    assert result.metrics["eval_accuracy"] == best > result.baseline["eval_accuracy"]
    assert result.steps == result.exported_step + 3 * 2 < 60


STOPS = {
    "at a step whose evaluation is due": [{"step": 6}],
    "at the best step, and before the patience is over": [{"step": 6}, {"step": 9}],
    "when the patience is over": [{"step": RISEN}],
    "after the end, before anything is delivered": [{"stage": Stage.EXPORTING}],
}


@pytest.mark.parametrize("case", STOPS)
def test_a_run_that_was_stopped_ends_early_at_the_same_step(tmp_path, early, case):
    root, expected = early
    job = an_overfitting_job(tmp_path, patience=2)
    for number, stop in enumerate(STOPS[case], start=1):
        with pytest.raises(StoppedError):
            attempt(job, tmp_path, number, **stop)
    found = attempt(job, tmp_path, 9)
    assert (found.steps, found.exported_step, found.stopped_early) == (RISEN, 6, expected.stopped_early)
    assert found.metrics == expected.metrics
    assert equal(delivered(tmp_path), delivered(root))


@pytest.mark.parametrize("step", [BEST, BEST + 1, LAST])
def test_a_run_that_was_stopped_keeps_its_best_step(tmp_path, whole, step):
    root, expected = whole
    job = an_overfitting_job(tmp_path)
    with pytest.raises(StoppedError):
        attempt(job, tmp_path, 1, step=step)
    found = attempt(job, tmp_path, 2)
    assert (found.exported_step, found.metrics) == (BEST, expected.metrics)
    assert equal(delivered(tmp_path), delivered(root))


class Spoils(Reporter):
    """Flips a bit of the best step's weights, or takes the step away, when it is about to be fetched."""

    def __init__(self, root: Path, how: str) -> None:
        super().__init__()
        self._folder, self._how = root / f"out/checkpoints/step-{BEST:08d}", how

    def stage(self, stage, detail=""):
        if "the best one" in detail and self._how == "missing":
            (self._folder / "manifest.json").unlink()
        elif "the best one" in detail:
            weights = self._folder / "trainable.safetensors"
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        super().stage(stage, detail)


@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_without_its_best_step_the_last_one_is_delivered_and_that_is_said(tmp_path, how):
    job = an_overfitting_job(tmp_path)
    context = a_context(job, tmp_path / "scratch")
    object.__setattr__(context, "reporter", Spoils(tmp_path, how))
    result = run(job, context.scratch, context=context)
    assert result.exported_step == LAST
    assert equal(delivered(tmp_path), load_file(tmp_path / f"out/checkpoints/step-{LAST:08d}/trainable.safetensors"))
    assert any(
        f"step {BEST} was the best, but step {LAST} is delivered" in text for text in report(tmp_path)["warnings"]
    )
