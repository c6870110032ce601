"""The operator as a process over a real API server, and a hand that plays the kubelet: nothing trains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_operator.cluster.port import Object
from tests.e2e.cluster import items, kubectl, status_of

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0


def tune(namespace: str, name: str, **spec: Any) -> Object:
    return {
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "task": {"type": "Instruction"}, "model": {"uri": "s3://models/m"}, "dataset": {"uri": "s3://data/d.jsonl"},
            "strategy": {"type": "LoRA"}, "output": {"uri": f"s3://out/{name}"},
            "resources": {"cpu": "10m", "memory": "64Mi", "scratch": "1Gi"},
            "scheduling": {"schedulerName": "nobody"},
            **spec,
        },
    }  # fmt: skip


class Operator:
    """`finetune-operator` as a process under the chart's own Role, and a hand that plays the kubelet."""

    def __init__(self, namespace: str, kubeconfig: Path) -> None:
        self.namespace = namespace
        command = [
            sys.executable, "-m", "finetune_operator.main", "--namespaces", namespace, "--http-port", "0",
            "--trainer-image", "example.invalid/trainer:1", "--resync-seconds", "300", "--log-format", "json",
        ]  # fmt: skip
        path = os.pathsep.join(str(ROOT / folder) for folder in ("crds", "operator"))
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": path}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(command, env=environment, stderr=self.log)

    def stop(self, kill: bool = False) -> str:
        self.process.kill() if kill else self.process.terminate()
        code = self.process.wait(30)
        self.log.seek(0)
        log = self.log.read().decode()
        # One that was only just started has no handler yet.
        assert kill or code in (0, -signal.SIGTERM), log
        return log


async def eventually(true: Callable[[], Any]) -> Any:
    """The first answer that is true, within SECONDS."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        # Between creation and first status, fields are missing.
        with contextlib.suppress(KeyError):
            answer = true()
            if answer:
                return answer
        await asyncio.sleep(0.3)
    raise AssertionError("it did not come true in time")


async def reaches(namespace: str, name: str, phase: str, **fields: Any) -> Object:
    wanted = {"phase": phase, **fields}

    def reached() -> Object | None:
        now = status_of(namespace, name)
        return now if all(now[field] == value for field, value in wanted.items()) else None

    found: Object = await eventually(reached)
    return found


async def live_pod(namespace: str, name: str, attempt: int) -> str:
    def find() -> str | None:
        for pod in items("pods", "-n", namespace, "-l", f"finetune.dev/job={name}"):
            annotations = pod["metadata"]["annotations"]
            if annotations["finetune.dev/attempt"] == str(attempt) and pod["status"]["phase"] == "Pending":
                return str(pod["metadata"]["name"])
        return None

    return str(await eventually(find))


def play_kubelet(namespace: str, pod: str, code: int | None, message: str = "") -> None:
    """Write that the trainer runs (None) or has ended."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ended = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message, "finishedAt": now}
    container = {
        "name": "trainer", "image": "x", "imageID": "x", "ready": code is None, "restartCount": 0,
        "state": {"running": {"startedAt": now}} if code is None else {"terminated": ended},
    }  # fmt: skip
    phase = "Running" if code is None else ("Failed" if code else "Succeeded")
    patch = json.dumps({"status": {"phase": phase, "containerStatuses": [container]}})
    kubectl("-n", namespace, "patch", "pod", pod, "--subresource=status", "--type=merge", "-p", patch)


def result_of(name: str) -> str:
    output = {"uri": f"s3://out/{name}/adapter", "kind": "adapter"}
    return json.dumps(
        {"exitCode": 0, "result": {"job": name, "output": output, "steps": 9, "metrics": {"eval_loss": 1.5}}}
    )
