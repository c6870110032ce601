"""What two ranks write of a model in shards is what one process writes of it whole, with one tensor in memory."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from finetune_trainer.consolidation import LARGEST_FILE
from tests.support.torchrun import torchrun
from tests.trainer import export_ranks
from tests.trainer.export_ranks import CASES, RANKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    torchrun(export_ranks, folder, ranks=RANKS)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_one_process(written, case):
    whole, shards = (
        {path.name: path.read_bytes() for path in (written / case / way).iterdir() if path.name.startswith("model")}
        for way in ("whole", "shards")
    )
    assert whole == shards
    assert any(name.endswith("index.json") for name in whole) == ("small files" in case)


def test_rank_0_holds_one_tensor_above_its_shards(written):
    found = json.loads((written / "found.json").read_text())["Llama, many blocks, small files"]
    # What travels, what arrives, and what is written; torch gathers into one piece and copies the parts together.
    assert found["above"] <= 3 * found["largest"]
    assert found["above"] < found["all"] / 10


def test_models_are_divided_into_files_as_the_library_divides_them():
    assert inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default == LARGEST_FILE
