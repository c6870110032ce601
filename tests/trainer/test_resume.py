"""A job that is stopped and goes on ends with the same weights, the same baseline and the same result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune_api.contract import Stage
from finetune_trainer import train
from finetune_trainer.errors import StoppedError
from finetune_trainer.evaluation import Measured
from finetune_trainer.result import Output
from finetune_trainer.storage import Store
from tests.support.jobs import a_context, a_job, run
from tests.trainer.stopping import StopsAt


def attempt(job, root: Path, number: int, **stop):
    context = a_context(job, root / f"scratch-{number}", number)
    if stop:
        object.__setattr__(context, "reporter", StopsAt(context.stop, **stop))
    return run(job, context.scratch, number, context)


def a_resumable_job(root: Path, strategy: str, task: str = "Instruction"):
    return a_job(
        root,
        strategy,
        task,
        hyperparameters={"maxSteps": 9, "dropout": 0.1, "gradientAccumulationSteps": 2, "perDeviceBatchSize": 2},
        checkpoint={"everySteps": 3},
        evaluation={"everySteps": 2},
    )


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "out/checkpoints/step-00000009/trainable.safetensors")


STOPS = {
    ("Full", "Instruction"): [{"stage": Stage.EVALUATING}, {"step": 4}],
    ("LoRA", "Instruction"): [{"step": 1}, {"step": 4}, {"step": 5}],
    ("QLoRA", "Instruction"): [{"step": 4}],
    ("Full", "SequenceClassification"): [{"step": 1}, {"step": 4}],
    ("LoRA", "SequenceClassification"): [{"step": 5}],
    ("LoRA", "Regression"): [{"step": 4}],
    ("Adapter", "Instruction"): [{"step": 4}],
    ("PromptTuning", "Instruction"): [{"step": 4}],
    ("PrefixTuning", "Instruction"): [{"step": 4}],
    ("IA3", "Instruction"): [{"step": 4}],
    ("Additive", "Instruction"): [{"step": 4}],
}
"""An evaluation is due after every second step: what a stop at step 4 skips, the next attempt makes up for."""


@pytest.mark.parametrize(("strategy", "task"), STOPS)
def test_stopping_at_steps_and_during_evaluations_changes_no_weight(tmp_path, strategy, task):
    undisturbed = a_resumable_job(tmp_path / "one", strategy, task)
    expected = attempt(undisturbed, tmp_path / "one", 1)
    job = a_resumable_job(tmp_path / "two", strategy, task)
    for number, stop in enumerate(STOPS[strategy, task], start=1):
        with pytest.raises(StoppedError):
            attempt(job, tmp_path / "two", number, **stop)
    found = attempt(job, tmp_path / "two", 9)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert found.metrics == expected.metrics
    assert found.baseline == expected.baseline
    assert [s["before"] for s in found.samples] == [s["before"] for s in expected.samples]
    assert found.tokens == expected.tokens


def test_the_history_of_all_attempts_is_in_the_report(tmp_path):
    job = a_resumable_job(tmp_path, "LoRA")
    with pytest.raises(StoppedError, match="stopped on request after step 4, which is saved"):
        attempt(job, tmp_path, 1, step=4)
    attempt(job, tmp_path, 2)
    history = json.loads((tmp_path / "out/report/report.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 10))


def test_the_baseline_is_measured_once(tmp_path):
    job = a_resumable_job(tmp_path, "LoRA")
    with pytest.raises(StoppedError):
        attempt(job, tmp_path, 1, step=1)
    path = tmp_path / "out/report/baseline-uid-1.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"metrics": {"eval_loss": 12.5}}))
    assert attempt(job, tmp_path, 2).baseline == {"eval_loss": 12.5}


def test_two_jobs_that_share_an_output_by_mistake_leave_each_other_s_course_alone(tmp_path):
    job = a_resumable_job(tmp_path, "LoRA")
    metadata = job.metadata.model_copy(update={"uid": "uid-2"})
    ours, theirs = (Output(Store.connect({}), each) for each in (job, job.model_copy(update={"metadata": metadata})))
    for output, number in ((ours, 1), (theirs, 2)):
        output.keep_baseline(Measured(metrics={"eval_loss": number}))
        output.keep_choice({"kept": torch.tensor([number])})
        output.keep_divergence(number)
        output.keep_pin(f"hf://org/model@{number}")
    for output, number in ((ours, 1), (theirs, 2)):
        assert output.baseline().metrics == {"eval_loss": number}
        assert output.choice()["kept"].tolist() == [number]
        assert (output.diverged_from(), output.pinned()) == (number, f"hf://org/model@{number}")


def test_a_stop_before_training_leaves_at_once(tmp_path):
    job = a_resumable_job(tmp_path, "LoRA")
    with pytest.raises(StoppedError, match="outside of training"):
        attempt(job, tmp_path, 1, stage=Stage.PREPARING)
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_stop_within_an_evaluation_saves_the_step_before_it(tmp_path):
    job = a_resumable_job(tmp_path, "LoRA")
    context = a_context(job, tmp_path / "scratch-1")

    class StopInEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **_):
            if state.global_step == 2:
                context.stop.request()

    import finetune_trainer.session as session_module

    original = session_module.ProgressCallback
    session_module.ProgressCallback = lambda reporter, metrics: StopInEvaluation()
    try:
        with pytest.raises(StoppedError, match="after step 2"):
            run(job, context.scratch, 1, context)
    finally:
        session_module.ProgressCallback = original
    assert (tmp_path / "out/checkpoints/step-00000002/manifest.json").exists()


def test_a_corrupt_checkpoint_is_named_in_the_warnings_and_the_one_before_is_taken(tmp_path):
    job = a_resumable_job(tmp_path, "LoRA")
    with pytest.raises(StoppedError):
        attempt(job, tmp_path, 1, step=7)
    path = tmp_path / "out/checkpoints/step-00000007/trainable.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    context = a_context(job, tmp_path / "scratch-2", 2)
    steps: list[int] = []
    tell = context.reporter.update
    context.reporter.update = lambda **fields: (steps.append(fields.get("step", 0)), tell(**fields))
    run(job, context.scratch, 2, context)
    assert next(filter(None, steps)) == 6
    (warning,) = (text for text in context.reporter.snapshot().warnings if "corrupt" in text)
    assert warning.startswith("checkpoint of step 7 is corrupt and passed over: ")
    assert "step-00000007/trainable.safetensors has checksum" in warning


def test_long_waits_for_an_upload_are_a_warning(tmp_path):
    context = a_context(a_resumable_job(tmp_path, "LoRA"), tmp_path / "scratch")
    train._tell_wait(context, 1.0, moved=True)
    assert context.reporter.snapshot().warnings == []
    train._tell_wait(context, 6.0, moved=False)
    assert "larger checkpoint.everySteps" in context.reporter.snapshot().warnings[0]


def test_how_many_checkpoints_are_kept_is_read_anew_at_every_one(tmp_path):
    job = a_job(tmp_path, "LoRA", hyperparameters={"maxSteps": 4}, checkpoint={"everySteps": 1, "keep": 1})
    context = a_context(job, tmp_path / "scratch")
    changed = job.model_copy(deep=True)
    changed.spec.checkpoint.keep = 3
    context.job_file.write_text(changed.model_dump_json(by_alias=True, exclude_none=True))
    run(job, context.scratch, context=context)
    kept = sorted(path.parent.name for path in (tmp_path / "out/checkpoints").glob("*/manifest.json"))
    assert kept == ["step-00000002", "step-00000003", "step-00000004"]
