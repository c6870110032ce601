"""What helps when memory is exhausted: the job's own numbers, what changes no result first."""

from __future__ import annotations

import pytest

from finetune_trainer.estimate.advice import LAST_RESORT, less_memory, remedies
from tests.estimate.jobs import of

GPUS = {"gpusPerNode": 8}


def batch(rows: int, steps: int = 4) -> dict[str, int]:
    return {"perDeviceBatchSize": rows, "gradientAccumulationSteps": steps}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (4, "perDeviceBatchSize to 2 (now 4) and gradientAccumulationSteps to 8 (now 4)"),
        (6, "perDeviceBatchSize to 3 (now 6) and gradientAccumulationSteps to 8 (now 4)"),
        (5, "perDeviceBatchSize to 1 (now 5) and gradientAccumulationSteps to 20 (now 4)"),
        (9, "perDeviceBatchSize to 3 (now 9) and gradientAccumulationSteps to 12 (now 4)"),
    ],
)
def test_the_batch_is_divided_first_and_stays_as_it_is_globally(rows: int, words: str) -> None:
    job = of("Full", hyperparameters=batch(rows))
    assert less_memory(job) == f"set hyperparameters.{words}: the same global batch in less memory"
    assert all(
        remedy.spec.hyperparameters.per_device_batch_size * remedy.spec.hyperparameters.gradient_accumulation_steps
        == rows * 4
        for remedy in remedies(job.spec, sharded=False)
    )


def test_a_batch_is_not_divided_into_more_steps_than_the_api_takes() -> None:
    job = of("Full", hyperparameters={**batch(4, 50_000), "gradientCheckpointing": False})
    assert steps(job)[0] == "recompute"
    assert "gradientCheckpointing" in less_memory(job)


def steps(job: object, *, sharded: bool = False) -> list[str]:
    """What each remedy is about."""
    fields = {
        "perDeviceBatchSize": "batch",
        "gradientCheckpointing": "recompute",
        "sharding": "shard",
        "optimizer": "8bit",
        "QLoRA": "quantise",
        "maxLength": "shorter",
    }
    words = [remedy.words for remedy in remedies(job.spec, sharded=sharded)]
    return [next(short for name, short in fields.items() if name in text) for text in words]


def test_single_rows_are_recomputed_then_sharded_then_held_in_fewer_bits() -> None:
    job = of("Full", hyperparameters={**batch(1), "gradientCheckpointing": False}, resources=GPUS)
    assert steps(job) == ["recompute", "shard", "quantise", "shorter", "shorter", "shorter"]
    alone = of("Full", hyperparameters={**batch(1), "maxLength": 256}, resources={"gpusPerNode": 1})
    assert steps(alone) == ["8bit", "quantise"]


def test_what_cannot_be_sharded_is_not_advised_to_be() -> None:
    compiled = {**batch(1), "maxLength": 256, "torchCompile": True}
    assert steps(of("Full", hyperparameters=compiled, resources=GPUS)) == ["quantise"]


def test_nothing_is_advised_that_is_so_already_or_cannot_be() -> None:
    assert steps(of("QLoRA", hyperparameters={**batch(1), "maxLength": 256}, resources=GPUS), sharded=True) == []
    assert steps(of("LoRA", hyperparameters={**batch(1), "maxLength": 256}, resources={"gpusPerNode": 1})) == [
        "quantise"
    ]
    prefix = of("PrefixTuning", hyperparameters={**batch(1), "maxLength": 256})
    assert steps(prefix) == ["quantise"]
    images = of("Full", task="ImageClassification", hyperparameters=batch(1))
    assert steps(images) == ["8bit", "quantise"]


def test_where_nothing_is_left_to_change_only_a_larger_gpu_helps() -> None:
    assert less_memory(of("QLoRA", hyperparameters={**batch(1), "maxLength": 256}, resources=GPUS), sharded=True) == (
        LAST_RESORT
    )


def test_with_an_estimate_as_many_steps_are_told_as_are_needed() -> None:
    job = of("Full", hyperparameters=batch(4, 1))
    told = less_memory(job, fits=lambda spec: spec.hyperparameters.per_device_batch_size == 1)
    assert told == (
        "set hyperparameters.perDeviceBatchSize to 2 (now 4) and gradientAccumulationSteps to 2 (now 1): the same "
        "global batch in less memory; then set hyperparameters.perDeviceBatchSize to 1 (now 2) and "
        "gradientAccumulationSteps to 4 (now 2): the same global batch in less memory"
    )
    assert less_memory(job, fits=lambda spec: False).endswith(f"(now 512); then {LAST_RESORT}")


def test_an_estimate_that_was_proven_too_low_still_gives_the_next_step() -> None:
    job = of("Full", hyperparameters=batch(4, 1))
    assert less_memory(job, fits=lambda spec: True) == less_memory(job)
