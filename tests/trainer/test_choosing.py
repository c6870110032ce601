"""Auto: whole on every device where that fits, in shards where it does not and where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.run import Sharding
from finetune_trainer.choosing import Size, choose_sharding, held_bytes
from finetune_trainer.memory import memory_limit
from tests.support.jobs import a_job

GB = 10**9
EIGHT_BILLION = {"Full": Size(8 * GB, 8 * GB, 4), "LoRA": Size(8 * GB, GB // 50, 2), "QLoRA": Size(8 * GB, 1, 0.57)}


@pytest.mark.parametrize(
    ("strategy", "memory", "chosen"),
    [
        pytest.param("Full", 80 * GB, Sharding.FSDP, id="16 bytes a parameter that learns"),
        pytest.param("Full", 200 * GB, Sharding.DDP, id="which fit here"),
        pytest.param("LoRA", 24 * GB, Sharding.DDP, id="2 bytes a frozen one"),
        pytest.param("LoRA", 16 * GB, Sharding.FSDP, id="which do not fit here"),
        pytest.param("QLoRA", 8 * GB, Sharding.DDP, id="half a byte"),
    ],
)
def test_a_model_is_sharded_where_it_does_not_fit(tmp_path: Path, strategy: str, memory: int, chosen: Sharding) -> None:
    job = a_job(tmp_path, strategy)
    assert choose_sharding(job.spec, EIGHT_BILLION[strategy], memory) is chosen


@pytest.mark.parametrize("hyperparameters", [{"optimizer": "adamw8bit"}, {"torchCompile": True}])
def test_what_the_api_refuses_in_shards_is_never_chosen(tmp_path: Path, hyperparameters: dict[str, Any]) -> None:
    job = a_job(tmp_path, "Full", hyperparameters=hyperparameters)
    assert choose_sharding(job.spec, EIGHT_BILLION["Full"], GB) is Sharding.DDP


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    whole = memory_limit(tmp_path)
    assert whole > GB
    (tmp_path / "memory.max").write_text("123456789\n")
    assert memory_limit(tmp_path) == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == whole


def test_what_is_in_4_bits_takes_little_more_than_half_a_byte(tmp_path: Path) -> None:
    assert held_bytes(a_job(tmp_path, "QLoRA").spec.strategy.type, torch.bfloat16) < 0.6
    assert held_bytes(a_job(tmp_path, "LoRA").spec.strategy.type, torch.bfloat16) == 2
