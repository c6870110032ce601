"""One rank meets a step that is not finite: all stop before it, and none waits for another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.divergence_ranks import BAD_STEP, CULPRIT

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "what"), [("ddp", "gradient"), ("fsdp", "gradient"), ("scaled", "loss")])
def test_all_ranks_stop_before_the_step_that_is_not_finite_on_one(tmp_path, kind, what):
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator", "trainer_image"))
    script = str(ROOT / "tests/trainer/divergence_ranks.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path, kind],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
        assert found["told"].startswith(f"the {what} became "), rank
        assert found["told"].endswith(f" in step {BAD_STEP}; that step was not taken")
        assert (found["kept"], found["step"]) == (True, BAD_STEP - 1)
        if kind == "scaled":
            assert ("on another rank" in found["told"]) == (rank != CULPRIT)
