"""Whole runs by several ranks, through launch and session: the losses of one process, over pods and in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob
from tests.support import gangs
from tests.support.jobs import a_job, run

pytestmark = pytest.mark.slow
STEPS = 50
ROWS_A_STEP = 4
LAYOUTS = {"two processes of a pod": {"processes": 2}, "two pods": {"nodes": 2, "processes": 1}}
STRATEGIES = {
    "Full": {},
    "LoRA": {"lora": {"dropout": 0.0}},
    "QLoRA": {"lora": {"dropout": 0.0}},
}


def a_gang_job(root: Path, strategy: str, ranks: int, task: str = "Instruction", /, **spec: Any) -> FineTuneJob:
    """The same rows in every step, however many ranks divide them."""
    hyper = {
        "epochs": 100,
        "maxSteps": STEPS,
        "learningRate": 1e-3,
        "perDeviceBatchSize": ROWS_A_STEP // ranks,
        **spec.pop("hyperparameters", {}),
    }
    spec = {"dataset": {"validation": None}, "evaluation": {"samples": 0}, "checkpoint": {"everySteps": 100}} | spec
    return a_job(root, strategy, task, hyperparameters=hyper, **STRATEGIES.get(strategy, {}), **spec)


def history(root: Path) -> list[dict[str, float]]:
    return json.loads((root / "out/report/report.json").read_text())["history"]


def losses(root: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in history(root) if name in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, by strategy."""
    found = {}
    for strategy in STRATEGIES:
        root = tmp_path_factory.mktemp(strategy)
        run(a_gang_job(root, strategy, 1), root / "scratch")
        found[strategy] = losses(root)
    return found


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [("Full", "two processes of a pod"), ("LoRA", "two pods"), ("QLoRA", "two processes of a pod")],
)
def test_two_ranks_learn_as_one_with_the_same_rows(tmp_path, alone, strategy, layout):
    result = gangs.train(a_gang_job(tmp_path, strategy, 2), tmp_path / "pods", **LAYOUTS[layout])
    assert losses(tmp_path) == pytest.approx(alone[strategy], abs=1e-4)
    assert (result.steps, result.world_size, result.global_batch_size) == (STEPS, 2, ROWS_A_STEP)
    assert result.learning_rate == 1e-3


def test_a_gang_that_is_stopped_goes_on_bit_by_bit(tmp_path):
    spec = {
        "hyperparameters": {"maxSteps": 8, "dropout": 0.1, "packing": True, "gradientAccumulationSteps": 2},
        "checkpoint": {"everySteps": 3},
        "dataset": {"validation": {"fraction": 0.2}},
        "evaluation": {"everySteps": 2, "samples": 0},
    }
    kinds = ("Full", 2, "CausalLM")
    expected = gangs.train(a_gang_job(tmp_path / "one", *kinds, **spec), tmp_path / "one/pods")
    job = a_gang_job(tmp_path / "two", *kinds, **spec)
    (pod,) = gangs.start(job, tmp_path / "two/pods", entry="tests.trainer.gang_entries:stop_rank_1_at_step_4")
    assert gangs.wait([pod]) == [ExitCode.TEMPFAIL], pod.log[-3000:]
    assert "stopped on request after step 4, which is saved" in pod.message.message
    found = gangs.train(job, tmp_path / "two/pods", nodes=2, processes=1, attempt=2)
    one, two = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (found.metrics, found.exported_step) == (expected.metrics, expected.exported_step)
