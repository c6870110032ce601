"""`finetune run` with the real trainer in two pods that train together, one of which loses its rank on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.local.jobs import fine_tune_job
from tests.support.models import greetings, save_tiny_llama
from tests.support.processes import processes_in, wait_for
from tests.support.shell import Shell

START_SECONDS = 240


def _rank(folder: Path) -> int:
    """The process of a pod that trains."""
    (rank,) = [pid for pid in processes_in(folder) if b"finetune_trainer.worker" in _command(pid)]
    return rank


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _job(folder: Path) -> dict[str, Any]:
    objects = json.loads((folder / ".finetune/objects.json").read_text())["objects"]
    found: dict[str, Any] = next(obj for obj in objects if obj["kind"] == "FineTuneJob")
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gang_that_loses_a_rank_starts_again_whole_and_comes_to_its_end(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    save_tiny_llama(tmp_path / "model")
    shell.write("data.jsonl", "".join(json.dumps(row) + "\n" for row in greetings(64)))
    hyper = {"maxSteps": 60, "epochs": 100, "maxLength": 128, "perDeviceBatchSize": 2}
    job = fine_tune_job(
        tmp_path, hyperparameters=hyper, checkpoint={"everySteps": 5}, resources={"nodes": 2}, evaluation={"samples": 0}
    )
    shell.write("job.yaml", yaml.safe_dump(job))
    run = shell.start("run", "job.yaml")
    try:
        checkpoints = tmp_path / "out/checkpoints"
        wait_for(lambda: list(checkpoints.glob("*/manifest.json")), START_SECONDS)
        (second,) = (tmp_path / ".finetune/pods").glob("tune-1-*")
        os.kill(_rank(second), signal.SIGKILL)
        out, err = run.communicate(timeout=START_SECONDS)
    finally:
        run.kill()
    assert run.returncode == 0, out + err
    status = _job(tmp_path)["status"]
    assert (status["phase"], status["attempt"], status["progress"]["steps"]) == ("Succeeded", 2, "60/60")
    assert (status["restarts"]["total"], status["restarts"]["infrastructure"]) == (1, 1)
    wait_for(lambda: not processes_in(tmp_path))
