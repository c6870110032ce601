"""Whole runs by several ranks, through launch and session: the losses of one process, replicated and in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.contract import Result
from finetune_api.job import FineTuneJob, StrategyType
from tests.support import gangs
from tests.support.images import an_image_job
from tests.support.jobs import a_job, run
from tests.support.models import save_tiny_llama
from tests.trainer.gang_entries import STOPPED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS, ROWS_A_STEP = 50, 8
EVALUATED = {"dataset": {"validation": {"fraction": 0.2}}, "evaluation": {"everySteps": 4, "samples": 1}}
PLAIN: dict[str, Any] = {
    "dataset": {"validation": None},
    "evaluation": {"samples": 0},
    "checkpoint": {"everySteps": 100},
}
NO_DROPOUT = {"lora": {"dropout": 0.0}}
MERGED = {"output": {"merge": True}}
ACCUMULATING = {"gradientAccumulationSteps": 2, "gradientCheckpointing": True, "maxSteps": 10}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("Full", "Instruction", {}),
    "lora": ("LoRA", "Instruction", NO_DROPOUT),
    "qlora": ("QLoRA", "Instruction", {**NO_DROPOUT, **MERGED}),
    "packed": ("Full", "CausalLM", {"hyperparameters": {"packing": True, "maxLength": 64, **ACCUMULATING}}),
    "recomputing": ("LoRA", "Instruction", {"hyperparameters": ACCUMULATING, **NO_DROPOUT}),
    "unfreezing": (
        "Full",
        "Instruction",
        {"hyperparameters": {"layerDecay": 0.8, "maxSteps": 12}, "unfreezing": {"everySteps": 4}},
    ),
    "tied": ("Full", "Instruction", {"hyperparameters": {"maxSteps": 10}, "tied": True}),
    "streamed": (
        "LoRA",
        "Instruction",
        {"hyperparameters": {"maxSteps": 10}, "dataset": {"streaming": True, "validation": None}, **NO_DROPOUT},
    ),
    # The first four steps have whole batches.
    "images": ("Full", "ImageClassification", {"hyperparameters": {"maxSteps": 4}}),
    "head": (
        "LoRA",
        "SequenceClassification",
        {"hyperparameters": {"maxSteps": 10}, "output": {"merge": True}, **NO_DROPOUT},
    ),
}
"""Strategy, task, and what else there is of a job."""
STRATEGIES = {strategy for strategy, *_ in CASES.values()}
WAYS = {
    "ddp": {"sharding": "DDP"},
    "fsdp": {"sharding": "FSDP"},
}
DISTURBED = {
    "hyperparameters": {"maxSteps": 8, "dropout": 0.1, "gradientAccumulationSteps": 2},
    "checkpoint": {"everySteps": 3},
    **EVALUATED,
}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = (
    {
        f"{way}-{name}": ("Full", "CausalLM", {**DISTURBED, "distributed": sharding})
        for way, sharding in WAYS.items()
        for name in ("undisturbed", STOPPED)
    }
    | {
        "ddp-early": (
            "Full",
            "Instruction",
            {
                **EVALUATED,
                "hyperparameters": {"maxSteps": 40, "learningRate": 0.1},
                "evaluation": {"everySteps": 2, "samples": 0, "earlyStopping": {"patience": 1}},
                "distributed": WAYS["ddp"],
            },
        ),
        "fsdp-sgd": (
            "Full",
            "Instruction",
            {"hyperparameters": {"maxSteps": 3, "optimizer": "sgd"}, "distributed": WAYS["fsdp"]},
        ),
        "fsdp-offloaded": (
            "Full",
            "Instruction",
            {
                "hyperparameters": {"maxSteps": 3},
                "distributed": {**WAYS["fsdp"], "fsdp": {"reshardAfterForward": False, "cpuOffload": True}},
            },
        ),
    }
    | {
        f"fsdp-bfloat16-{name}": (
            strategy,
            task,
            {**spec, "hyperparameters": {"maxSteps": 4}, "model": {"dtype": "bfloat16"}, "distributed": WAYS["fsdp"]},
        )
        for name, (strategy, task, spec) in CASES.items()
        if name in ("full", "head", "qlora")
    }
    | {
        f"fsdp-{strategy.value}": (
            strategy.value,
            "Instruction",
            {"hyperparameters": {"maxSteps": 4}, **EVALUATED, "distributed": WAYS["fsdp"]},
        )
        for strategy in StrategyType
        if strategy.value not in STRATEGIES
    }
)


def gang_job(root: Path, ranks: int, case: tuple[str, str, dict[str, Any]], **more: Any) -> FineTuneJob:
    """The same rows in every step, however many ranks divide them; those of one pod, unless there is more to say."""
    strategy, task, spec = case
    spec = {**PLAIN, "resources": {"processesPerNode": ranks}, **spec, **more}
    if strategy == "Partial":
        spec["select"] = {"layers": {"last": 1}}
    if spec.pop("tied", False):
        save_tiny_llama(root / "model", tie_word_embeddings=True)
    micro_steps = spec.get("hyperparameters", {}).get("gradientAccumulationSteps", 1)
    hyper = {
        "epochs": 100,
        "maxSteps": STEPS,
        "learningRate": 1e-3,
        "perDeviceBatchSize": ROWS_A_STEP // ranks // micro_steps,
        **spec.pop("hyperparameters", {}),
    }
    if task == "ImageClassification":
        return an_image_job(root, strategy, hyperparameters=hyper, **spec)
    return a_job(root, strategy, task, hyperparameters=hyper, **spec)


def history(root: Path) -> list[dict[str, float]]:
    return json.loads((root / "out/report/report.json").read_text())["history"]


def losses(root: Path) -> list[float]:
    return [entry["loss"] for entry in history(root) if "loss" in entry]


def course(root: Path) -> list[dict[str, float]]:
    """What was logged, without speed and times."""
    told = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity")
    return [{name: entry[name] for name in told if name in entry} for entry in history(root)]


def result(root: Path) -> Result:
    return Result.model_validate_json((root / "out/result.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, by case."""
    found = {}
    for name, case in CASES.items():
        root = tmp_path_factory.mktemp(name)
        run(gang_job(root, 1, case), root / "scratch")
        found[name] = losses(root)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each job that two processes of a pod have trained."""
    folder = tmp_path_factory.mktemp("together")
    jobs = {
        f"{way}-{name}": gang_job(folder / f"{way}-{name}", 2, case, distributed=sharding)
        for way, sharding in WAYS.items()
        for name, case in CASES.items()
    } | {name: gang_job(folder / name, 2, case) for name, case in MORE.items()}
    gangs.train_all(jobs, folder / "pods")
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_as_one_with_the_same_rows(alone, together, case, way):
    assert losses(together / f"{way}-{case}") == pytest.approx(alone[case], abs=1e-4)


@pytest.mark.parametrize("name", [*(f"{way}-{case}" for way in WAYS for case in CASES), *MORE])
def test_every_one_delivers_what_loads_and_says_what_a_step_was(together, name):
    found = result(together / name)
    _, _, spec = MORE[name] if name in MORE else CASES[name.partition("-")[2]]
    for kind in {found.output.kind, "model"} if "output" in spec else {found.output.kind}:
        files = list((together / name / "out" / kind).glob("*.safetensors"))
        assert files
        assert all(load_file(file) for file in files)
    assert (found.world_size, found.global_batch_size) == (2, ROWS_A_STEP)


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_stop_together_and_go_on_bit_by_bit(together, way):
    roots = [together / f"{way}-{name}" for name in ("undisturbed", STOPPED)]
    one, two = (load_file(root / "out/model/model.safetensors") for root in roots)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert course(roots[0]) == course(roots[1])
    assert result(roots[0]).metrics == result(roots[1]).metrics


def test_all_ranks_stop_early_and_deliver_the_best_step(together):
    found, root = result(together / "ddp-early"), together / "ddp-early"
    measured = {entry["step"]: entry["eval_loss"] for entry in history(root) if "eval_loss" in entry}
    assert found.stopped_early
    assert found.exported_step == min(measured, key=measured.__getitem__)


def test_two_pods_with_a_model_in_shards_learn_as_one(tmp_path, alone):
    job = gang_job(tmp_path, 2, CASES["lora"], distributed=WAYS["fsdp"], resources={"nodes": 2})
    found = gangs.train(job, tmp_path / "pods")
    assert losses(tmp_path) == pytest.approx(alone["lora"], abs=1e-4)
    assert (found.steps, found.world_size, found.learning_rate) == (STEPS, 2, 1e-3)
