"""Real trainer pods: launch in a process of its own, with an address, a scratch folder and a termination log."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune_api import contract
from finetune_api.contract import TerminationMessage
from tests.support.gangs import fresh_address, pod_environment

ROOT = Path(__file__).resolve().parents[2]
JOB: dict[str, Any] = {
    "metadata": {"name": "tiny", "uid": "u-1"},
    "spec": {
        "task": {"type": "Instruction"},
        "model": {"uri": "file:///model"},
        "dataset": {"uri": "file:///data"},
        "strategy": {"type": "LoRA"},
    },
}


def job(output: Path, stall: int) -> dict[str, Any]:
    places = {"output": {"uri": f"file://{output}"}, "runPolicy": {"stallTimeoutSeconds": stall}}
    return {**JOB, "spec": {**JOB["spec"], **places}}


@dataclass
class RunningPod:
    """A launched pod; its output is collected by a thread, and can be waited for line by line."""

    process: subprocess.Popen[str]
    folder: Path
    address: str
    lines: list[str] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._arrived:
                self.lines.append(line.rstrip("\n"))
                self._arrived.notify_all()
        with self._arrived:
            self.lines.append("<end of output>")
            self._arrived.notify_all()

    def line(self, containing: str, timeout: float = 60) -> str:
        """The first line with some words in it, waited for."""

        def found() -> str | None:
            return next((line for line in self.lines if containing in line), None)

        with self._arrived:
            self._arrived.wait_for(lambda: found() or "<end of output>" in self.lines, timeout)
        hit = found()
        assert hit is not None, f"{containing!r} was never said:\n{self.output}"
        return hit

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, timeout: float = 60) -> int:
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    @property
    def message(self) -> TerminationMessage:
        data = (self.folder / "termination-log").read_bytes()
        assert len(data) <= contract.MAX_TERMINATION_BYTES
        return TerminationMessage.from_wire(json.loads(data))


StartPod = Callable[..., RunningPod]


@pytest.fixture
def start_pod(tmp_path: Path) -> Iterator[StartPod]:
    """Start `start_pod("function of entries, or module:function", **environment)`.

    `patience` bounds the wait for the gang, `stall` is the job's runPolicy.stallTimeoutSeconds.
    """
    pods: list[RunningPod] = []

    def start(
        entry: str, patience: float = 60, address: str | None = None, stall: int = 1800, **extra: object
    ) -> RunningPod:
        folder = tmp_path / f"pod-{len(pods)}"
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job(tmp_path / "out", stall)))
        address = address or fresh_address()
        entry = entry if ":" in entry else f"entries:{entry}"
        env = pod_environment(folder, address, {contract.ENV_GRACE_PERIOD: 30, **extra})
        command = [sys.executable, "-m", "tests.launch.start", f"tests.launch.{entry}", str(patience)]
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        pods.append(RunningPod(process, folder, address))
        return pods[-1]

    yield start
    for pod in pods:
        pod.process.kill()
        pod.process.wait()


def ended(pid: int, seconds: float) -> bool:
    """Whether a process that is no child of ours ends within some seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
