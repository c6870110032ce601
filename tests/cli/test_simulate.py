"""`finetune plan --simulate` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.test_validate_and_plan import JOB, LLAMA
from tests.support.shell import Shell

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 192}
ONE_GPU = "resources: {gpusPerNode: 1, gpuProduct: NVIDIA-L4}"
LINES_BEFORE = "simulated from the model's shapes alone, GiB on the fullest GPU; nothing was run:"


@pytest.fixture
def simulated(tmp_path: Path) -> Callable[..., list[str]]:
    """The lines that the simulation of a job adds to its plan."""
    shell = Shell(tmp_path)

    def simulate(more: str, *arguments: str) -> list[str]:
        shell.write("job.yaml", JOB.replace("strategy:", f"{more}\n  strategy:").replace("LoRA", "Full"))
        shell.write("other.json", json.dumps(WIDE))
        done = shell.run("plan", "job.yaml", "--simulate", *arguments)
        assert done.returncode == 0, done.stderr
        lines = [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("#")]
        return lines[lines.index(LINES_BEFORE) + 1 :] if LINES_BEFORE in lines else lines

    return simulate


def test_a_table_tells_what_so_many_gpus_hold_and_send(simulated: Callable[..., list[str]]) -> None:
    header, own, *rows = simulated(ONE_GPU, "--config", "other.json", "--world-size", "1024", "8", "1")
    assert header.split()[:3] == ["GPUs", "sharding", "parameters"]
    assert own.split()[:2] == ["1", "DDP"]
    assert own.split()[-1] == "0.000"
    assert [row.split()[:2] for row in rows[:2]] == [["1024", "DDP"], ["8", "DDP"]]
    assert [row.split()[-2] for row in rows[:2]] == ["4,096", "32"]
    assert rows[3].startswith("a checkpoint has 0.00")
    assert rows[-1] == "fits into NVIDIA-L4 with 22.5 GiB"


def test_without_a_configuration_or_a_product_it_says_what_is_not_known(simulated: Callable[..., list[str]]) -> None:
    assert simulated("", "--config", "other.json")[-1] == (
        "whether it fits is not known: resources.gpuProduct is not set"
    )
    assert simulated("")[-1].startswith("what it takes is not known: neither the job nor the environment names an S3")


def test_numbers_of_gpus_that_cannot_be_are_refused(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.write("job.yaml", JOB)
    done = shell.run("plan", "job.yaml", "--simulate", "--world-size", "2048")
    assert (done.returncode, done.stderr.splitlines()[-1][-52:]) == (
        2,
        "--world-size: '2048' is no number of GPUs from 1 to 1024"[-52:],
    )
    assert "--world-size belongs to --simulate" in shell.run("plan", "job.yaml", "--world-size", "8").stderr
