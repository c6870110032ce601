"""Schedules over two processes: the losses of one, and a stop changes nothing; replicated (DDP) and sharded (FSDP2).

Over gloo on the CPU, with our checkpoints.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.torchrun import torchrun
from tests.trainer import ranks
from tests.trainer.ranks import CASES, EVERY, scenario

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("one")
    return {name: scenario(folder / str(number), "one", case) for number, (name, case) in enumerate(CASES.items())}


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def together(request, tmp_path_factory) -> dict[str, dict]:
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    torchrun(ranks, folder, kind)
    return torch.load(folder / f"{kind}.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_as_one_with_the_same_rows(alone, together, case):
    assert together[case]["losses"] == pytest.approx(alone[case]["losses"], rel=1e-5)
    assert together[case]["moved"] == alone[case]["moved"]


@pytest.mark.parametrize("case", CASES)
def test_every_stage_moves_its_own(together, case):
    blocks = [{name.split(".")[2] for name in names if ".layers." in name} for names in together[case]["moved"]]
    assert blocks == [set()] * EVERY + [{"1"}] * EVERY + [{"0", "1"}] * EVERY


@pytest.mark.parametrize("case", CASES)
def test_a_stop_changes_neither_weights_nor_moments(together, case):
    assert together[case]["resumed"] == together[case]["undisturbed"]
