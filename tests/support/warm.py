"""Trainer pods that start warm: forks of one process that has imported what they need.

A launch of two ranks spends ten seconds of two cores on imports; tests of faults start a hundred. All else is as in a
pod: launch, its agent and its workers are processes of their own, with signals, exit codes and last words.

Run as `python -m tests.support.warm`: reads one order a line from stdin (JSON: folder, env, entry) and starts a pod for
each, whose process id is in FOLDER/pid at once and whose exit code in FOLDER/exit-code when it has ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api import contract
from finetune_api.job import FineTuneJob
from tests.support.gangs import ROOT, fresh_address
from tests.support.processes import wait_for

PRELOADED = (
    *("finetune_trainer.train", "finetune_trainer.agent", "finetune_trainer.launch", "finetune_trainer.worker"),
    *("trl", "peft", "torch.distributed", "transformers.trainer", "tests.trainer.fault_entries"),
    *("transformers.models.llama.modeling_llama", "accelerate", "torch.utils.data"),
)
TRAIN = "finetune_trainer.train:main"


class WarmPod:
    """A pod and what it leaves in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = int(wait_for(lambda: _read(folder / "pid"), 60))
        # From here on it hears signals.
        wait_for((folder / "scratch").exists, 60)

    def exit_code(self, seconds: float = 120) -> int:
        return int(wait_for(lambda: _read(self.folder / "exit-code"), seconds))

    @property
    def has_ended(self) -> bool:
        return bool(_read(self.folder / "exit-code"))

    def signal(self, number: int) -> None:
        """To launch, as the kubelet does; one that has ended by now does not mind."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


class WarmPods:
    """Starts pods; made by `warm_pods`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(
        self, job: FineTuneJob, folder: Path, *, nodes: int = 2, attempt: int = 1, entry: str = TRAIN, **env: Any
    ) -> list[WarmPod]:
        """Start all pods of an attempt, one rank each."""
        addresses = [fresh_address() for _ in range(nodes)]
        pods = []
        for rank, address in enumerate(addresses):
            own = folder / f"pod-{attempt}-{rank}"
            own.mkdir(parents=True)
            (own / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
            gang = {
                contract.ENV_NNODES: nodes,
                contract.ENV_NPROC_PER_NODE: 1,
                contract.ENV_NODE_RANK: rank,
                contract.ENV_MASTER_ADDR: addresses[0],
                contract.ENV_ATTEMPT: attempt,
                contract.ENV_JOB_FILE: own / "job.json",
                contract.ENV_SCRATCH_DIR: own / "scratch",
                contract.ENV_TERMINATION_LOG: own / "termination-log",
                contract.ENV_POD_IP: address,
                contract.ENV_GRACE_PERIOD: 60,
            }
            order = {"folder": str(own), "entry": entry, "env": {k: str(v) for k, v in {**gang, **env}.items()}}
            assert self._process.stdin is not None
            print(json.dumps(order), file=self._process.stdin, flush=True)
            pods.append(own)
        return [WarmPod(own) for own in pods]


@contextmanager
def warm_pods() -> Iterator[WarmPods]:
    """Pays for the imports once."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "crds", "trainer_image"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm"], env=env, cwd=ROOT, stdin=subprocess.PIPE, text=True
    )
    try:
        yield WarmPods(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


# --- the warm process ------------------------------------------------------------------------------------------------


class Forked:
    """As much of a Popen as Workers uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for module in PRELOADED:
        importlib.import_module(module)
    # What is loaded stays: collectors of the forks need not look at it, nor copy it.
    gc.freeze()
    # Nobody here waits for the pods; each has a process that does.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in iter(sys.stdin.readline, ""):
        if os.fork() == 0:
            _watch_over(**json.loads(line))


def _watch_over(folder: str, env: Mapping[str, str], entry: str) -> None:
    """Start a pod's launch and write down how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    place = Path(folder)
    pid = os.fork()
    if pid == 0:
        _launch(place, env, entry)
    _write(place / "pid", str(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _write(place / "exit-code", str(code))
    os._exit(0)


def _launch(folder: Path, env: Mapping[str, str], entry: str) -> None:
    from finetune_trainer import launch
    from finetune_trainer.workers import Workers, _Worker

    class ForkingWorkers(Workers):
        def _start(self, entrypoint: str, local_rank: int, env: Mapping[str, str]) -> _Worker:
            rank = self._pod.node_rank * self._pod.processes + local_rank
            reader, writer = os.pipe()
            agent, pid = os.getpid(), os.fork()
            if pid == 0:
                os.close(writer)
                _work(entrypoint, rank, reader, agent, env)
            os.close(reader)
            return _Worker(rank, Forked(pid), writer)  # type: ignore[arg-type]

    os.setsid()
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.update(env)
    launch.Workers = ForkingWorkers  # type: ignore[misc]
    code = launch.launch(entrypoint=entry, rendezvous_seconds=60)
    sys.stderr.flush()
    os._exit(code)


def _work(entrypoint: str, rank: int, reader: int, agent: int, env: Mapping[str, str]) -> None:
    from finetune_trainer import worker

    os.setpgid(0, 0)
    os.environ.update(env)
    sys.argv = ["worker", entrypoint, str(rank), str(reader), str(agent)]
    worker.main()


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


if __name__ == "__main__":
    main()
