"""N+M steps equal N, kill, M: bit by bit on the CPU, wherever the kill falls."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tests.checkpoints.interrupted import EVERY, STEPS

ROOT = Path(__file__).parents[2]


RANDOM_KILLS = {
    f"seed {seed}": [f"upload:{EVERY}", f"step:{rng.randrange(EVERY + 1, 7)}", f"step:{rng.randrange(7, STEPS)}"]
    for seed in range(4)
    for rng in [random.Random(seed)]
}
SCENARIOS = {
    "undisturbed": [],
    "after every step": [f"step:{step}" for step in range(1, STEPS)],
    "after the end": ["none"],
    **RANDOM_KILLS,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, object]]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator", "trainer_image"))
    folder = str(tmp_path_factory.mktemp("runs"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.interrupted", folder, json.dumps(SCENARIOS)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_after_each_step_in_turn_changes_nothing(outcomes):
    assert outcomes["after every step"]["digest"] == outcomes["undisturbed"]["digest"]
    # The checkpoint of step 9 may have been on its way when step 10 was killed; that of step 6 was waited for.
    assert outcomes["after every step"]["resumed_from"] in (6, 9)


def test_a_run_that_had_ended_is_not_trained_on(outcomes):
    assert outcomes["after the end"] == {"resumed_from": STEPS, "digest": outcomes["undisturbed"]["digest"]}


@pytest.mark.parametrize("name", RANDOM_KILLS)
def test_kills_at_random_steps_and_during_uploads_change_nothing(outcomes, name):
    assert outcomes[name]["digest"] == outcomes["undisturbed"]["digest"]
