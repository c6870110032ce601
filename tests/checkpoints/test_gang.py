"""Checkpoints of several ranks, replicated (DDP) and sharded (FSDP2): over gloo on the CPU, in two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import gang_ranks
from tests.checkpoints.gang_ranks import CALM, SINGLE_ROWS, STOP, train
from tests.support.torchrun import torchrun
from tests.trainer.ranks import STEPS

from finetune_trainer.checkpoints.pieces import Saved

pytestmark = pytest.mark.slow
LAST = f"bucket/checkpoints/step-{STEPS:08d}"
ALWAYS = {"manifest.json", "optimizer.pt", "rng.safetensors", "scheduler.pt", "trainer_state.json"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Put together from all files of a checkpoint."""
    saved = Saved(folder.glob("trainable*"))
    return {name: saved.read(name, (0,) * len(shape), shape) for name, shape in saved.shapes.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of one process that takes the same rows for each step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, "one", CALM)
    return weights(folder / LAST)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def together(request, tmp_path_factory) -> tuple[str, Path, dict[str, Any]]:
    """(kind, folder, result)."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    train(folder / "alone", "one", CALM, STOP)
    train(folder / "alone-rows", "one", SINGLE_ROWS, STOP)
    torchrun(gang_ranks, folder, kind)
    return kind, folder, json.loads((folder / "result.json").read_text())


def test_a_corrupt_part_of_one_rank_makes_all_take_the_checkpoint_before_and_nothing_changes(together):
    _, _, result = together
    assert result["random"]["from"] == STOP - 1
    assert len(result["random"]["warnings"]) == 1
    assert f"checkpoint of step {STOP} is corrupt and passed over" in result["random"]["warnings"][0]
    assert result["random"]["same"]


def test_adapters_resume_to_the_bit_with_the_generators_of_every_rank(together):
    _, _, result = together
    assert result["lora"] == result["lora"] | {"from": STOP, "warnings": [], "same": True}


def test_replicas_save_once_and_shards_each_their_own(together):
    kind, _, result = together
    names = ("trainable", "optimizer")
    whole = {f"{name}.safetensors" for name in names}
    parts = {f"{name}-0000{rank}-of-00002.safetensors" for name in names for rank in (0, 1)}
    # The counts of an optimizer's steps are not sharded.
    expected = whole if kind == "ddp" else parts | {"optimizer.safetensors"}
    assert set(result["random"]["files"]) == ALWAYS | expected


def test_a_checkpoint_of_adapters_holds_nothing_of_the_base(together):
    _, folder, _ = together
    names = weights(folder / "lora/whole" / LAST).keys()
    assert len(names) == 2 * 7 * 2
    assert all(".lora_" in name for name in names)


def test_what_one_rank_cannot_upload_ends_all_with_its_reason_and_is_no_checkpoint(together):
    kind, folder, result = together
    one, other = result["refused"]
    assert one == other
    assert f"trainable{'-00001-of-00002' if kind == 'fsdp' else ''}.safetensors: Is a directory" in one
    assert not (folder / "refused/bucket/checkpoints/step-00000002/manifest.json").exists()
    assert (folder / "refused/bucket/checkpoints/step-00000001/manifest.json").exists()


def test_more_ranks_go_on_from_what_one_has_saved(together, undisturbed):
    _, folder, result = together
    assert result["from one process"] == STOP
    assert_close(weights(folder / "alone" / LAST), undisturbed)


def test_one_goes_on_from_what_more_ranks_have_saved(together, undisturbed):
    _, folder, _ = together
    trainer = train(folder / "together", "one", CALM)
    assert (trainer.restored, trainer.warnings) == (STOP, [])
    assert_close(weights(folder / "together" / LAST), undisturbed)


def test_a_rank_that_holds_nothing_of_a_parameter_resumes_to_the_bit(together):
    _, _, result = together
    assert result["single rows"] == result["single rows"] | {"from": STOP, "warnings": [], "same": True}


def test_single_rows_go_on_in_more_ranks_and_in_fewer(together, tmp_path):
    _, folder, result = together
    train(tmp_path, "one", SINGLE_ROWS)
    undisturbed = weights(tmp_path / LAST)
    assert result["single rows from one process"] == STOP
    assert_close(weights(folder / "alone-rows" / LAST), undisturbed)
    trainer = train(folder / "together-rows", "one", SINGLE_ROWS)
    assert (trainer.restored, trainer.warnings) == (STOP, [])
    assert_close(weights(folder / "together-rows" / LAST), undisturbed)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # A step moves a weight by up to 1e-2, whatever it sees; two orders of addition leave less than this.
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-4)
