"""The estimate against what two real processes allocate, counted tensor by tensor, replicated and sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune_api.run import Sharding
from finetune_trainer.estimate.estimate import Estimator
from finetune_trainer.estimate.sketch import Sketch
from tests.estimate import ranks
from tests.estimate.ranks import CASES, RANKS, job_of
from tests.support.models import tiny_llama_config
from tests.support.torchrun import torchrun

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2000}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("counted")
    tiny_llama_config(**SIZES).save_pretrained(folder / "model")
    torchrun(ranks, folder, ranks=RANKS)
    return folder / "model", json.loads((folder / "counted.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_is_counted(counted: tuple[Path, dict[str, int]], case: str) -> None:
    folder, found = counted
    dtype = getattr(torch, CASES[case].get("dtype", "float32"))
    estimator = Estimator(lambda: Sketch.of(job_of(CASES[case]).spec, folder, dtype))
    sharding = Sharding.FSDP if CASES[case].get("sharded") else Sharding.DDP
    assert estimator.of(RANKS, sharding).memory.total == pytest.approx(found[case], rel=0.1)
