"""A job that is trained by several ranks, as in a cluster: each pod is a launch at an address of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_api import contract
from finetune_api.contract import Result, TerminationMessage
from finetune_api.job import FineTuneJob

JOBS = "TEST_JOBS"
"""Names the folder with a file for each job, where there are several."""
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240
"""For a run of some seconds; a busy machine takes many times that for the imports alone."""


def fresh_address() -> str:
    """A loopback address that no other test uses now: every pod has all ports to itself."""
    return f"127.{random.randint(1, 250)}.{random.randint(0, 250)}.{random.randint(2, 250)}"


@dataclass
class Pod:
    """A running launch, and what it leaves in its folder."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def message(self) -> TerminationMessage:
        return TerminationMessage.from_wire(json.loads((self.folder / "termination-log").read_text()))


def start(job: FineTuneJob, folder: Path, *, attempt: int = 1, entry: str = "") -> list[Pod]:
    """Start all pods of an attempt, as many as the job's resources say.

    Args:
        folder: for what the pods of this attempt need and leave.
        entry: `module:function` in place of the trainer's own.
    """
    nodes, processes = job.spec.resources.nodes, job.spec.resources.processes_per_node or 1
    first = fresh_address()
    addresses = [first, *(fresh_address() for _ in range(nodes - 1))]
    return [
        _start_one(job, folder / f"pod-{attempt}-{rank}", address, entry, {
            contract.ENV_NNODES: nodes,
            contract.ENV_NPROC_PER_NODE: processes,
            contract.ENV_NODE_RANK: rank,
            contract.ENV_MASTER_ADDR: first,
            contract.ENV_ATTEMPT: attempt,
        })
        for rank, address in enumerate(addresses)
    ]  # fmt: skip


def pod_environment(folder: Path, address: str, more: Mapping[str, object]) -> dict[str, str]:
    """Of a launch whose files lie in a folder, job.json among them."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PET_", "FINETUNE_"))},
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "crds", "trainer_image")),
        "OMP_NUM_THREADS": "1",
        contract.ENV_JOB_FILE: str(folder / "job.json"),
        contract.ENV_SCRATCH_DIR: str(folder / "scratch"),
        contract.ENV_TERMINATION_LOG: str(folder / "termination-log"),
        contract.ENV_POD_IP: address,
        **{name: str(value) for name, value in more.items()},
    }


def _start_one(job: FineTuneJob, folder: Path, address: str, entry: str, gang: dict[str, int | str]) -> Pod:
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    env = pod_environment(folder, address, gang)
    command = [sys.executable, "-m", "tests.launch.start", entry or "finetune_trainer.train:main"]
    with (folder / "log").open("wb") as log:
        return Pod(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log), folder)


def wait(pods: list[Pod], seconds: float = SECONDS) -> list[int]:
    """The exit codes; pods that do not end in time are killed."""
    try:
        return [pod.process.wait(seconds) for pod in pods]
    finally:
        for pod in pods:
            pod.process.kill()
            pod.process.wait()


def train(job: FineTuneJob, folder: Path, *, attempt: int = 1, entry: str = "", seconds: float = SECONDS) -> Result:
    """Train to the end; the result, which is index 0's to tell."""
    pods = start(job, folder, attempt=attempt, entry=entry)
    codes = wait(pods, seconds)
    assert not any(codes), "\n".join(pod.log[-6000:] for pod in pods)
    (result,) = [pod.message.result for pod in pods if pod.message.result]
    return result


def train_all(jobs: dict[str, FineTuneJob], folder: Path) -> None:
    """Train several jobs one after the other, by the same ranks: they ask for the same resources."""
    files = folder / "jobs"
    files.mkdir(parents=True)
    for name, job in jobs.items():
        (files / f"{name}.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    os.environ[JOBS] = str(files)
    train(next(iter(jobs.values())), folder, entry="tests.trainer.gang_entries:several", seconds=SECONDS * 4)
