"""One rank meets a step that is not finite: all stop before it, and none waits for another."""

from __future__ import annotations

import json

import pytest

from tests.support.torchrun import torchrun
from tests.trainer import divergence_ranks
from tests.trainer.divergence_ranks import BAD_STEP, CULPRIT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "what"), [("ddp", "gradient"), ("fsdp", "gradient"), ("scaled", "loss")])
def test_all_ranks_stop_before_the_step_that_is_not_finite_on_one(tmp_path, kind, what):
    torchrun(divergence_ranks, tmp_path, kind, seconds=120)
    for rank in range(2):
        found = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
        assert found["told"].startswith(f"the {what} became "), rank
        assert found["told"].endswith(f" in step {BAD_STEP}; that step was not taken")
        assert (found["kept"], found["step"]) == (True, BAD_STEP - 1)
        if kind == "scaled":
            assert ("on another rank" in found["told"]) == (rank != CULPRIT)
