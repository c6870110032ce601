"""Pods as processes of this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.contract import LABEL_COMPONENT
from finetune_operator.cluster.kubelet import Exit, StartError
from finetune_operator.cluster.local import shim
from finetune_operator.cluster.local.environment import address_of, environment, gpus_wanted, visible
from finetune_operator.cluster.local.folder import ConfigMaps, PodFolder
from finetune_operator.cluster.port import Object
from finetune_operator.plan.names import PREFLIGHT

TRAINER = ("-m", "finetune_trainer.launch")
"""What a pod runs here, by this very Python: image and command of the container are the cluster's business."""
GPUS = Path("/proc/driver/nvidia/gpus")


def machine_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The devices that this process may use, as CUDA numbers them."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    present = [str(index) for index, _ in enumerate(GPUS.iterdir())] if GPUS.is_dir() else []
    return [device for device in chosen.split(",") if device] if present and chosen is not None else present


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    folder: PodFolder
    devices: list[str]
    kill_at: float | None = None
    """On the monotonic clock; None until it is asked to stop."""


class ProcessRuntime:
    """Implements PodRuntime. Every pod is a session of its own, and dies with this process.

    Args:
        pods: folder for the pods' folders.
        claims: folder in which pvc://claim/path is `<claim>/path`.
        config_maps: reads a ConfigMap.
        overrides: variables that hold whatever the pod says.
        program: arguments of Python.
        gpus: devices that pods may be given.
    """

    def __init__(
        self,
        pods: Path,
        claims: Path,
        config_maps: ConfigMaps,
        *,
        environ: Mapping[str, str] = os.environ,
        overrides: Mapping[str, str],
        program: Sequence[str] = TRAINER,
        gpus: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pods, self._claims = pods.resolve(), claims.resolve()
        self._config_maps = config_maps
        self._environ, self._overrides = _with_absolute_paths(environ), overrides
        self._program = tuple(program)
        self._free_gpus = list(gpus)
        self._clock = clock
        self._running: dict[str, _Running] = {}

    def start(self, pod: Object) -> str:
        wanted = gpus_wanted(pod)
        if wanted > len(self._free_gpus):
            raise StartError(
                "CreateContainerError",
                f"the job asks for {wanted} GPU(s), {len(self._free_gpus)} are free on this machine; "
                "set resources.gpusPerNode to what there is, or to 0 for the CPU",
            )
        folder = PodFolder(self._pods, pod, self._claims)
        shutil.rmtree(folder.path, ignore_errors=True)
        mounts = folder.make(self._config_maps)
        devices = self._free_gpus[:wanted]
        overrides = {**folder.variables(mounts), **visible(devices), **self._overrides}
        variables = environment(pod, mounts, self._environ, overrides)
        self._free_gpus = self._free_gpus[wanted:]
        self._running[pod["metadata"]["uid"]] = _Running(self._spawn(pod, folder, variables), folder, devices)
        return address_of(pod, pod["spec"]["hostname"])

    def stop(self, pod: Object, grace_seconds: float) -> None:
        running = self._running[pod["metadata"]["uid"]]
        running.kill_at = self._clock() + grace_seconds
        if grace_seconds == 0:
            _kill_group(running.process)
        elif running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)

    def poll(self, pod: Object) -> Exit | None:
        running = self._running[pod["metadata"]["uid"]]
        code = running.process.poll()
        if code is None:
            if running.kill_at is not None and self._clock() >= running.kill_at:
                _kill_group(running.process)
            return None
        del self._running[pod["metadata"]["uid"]]
        return self._end(running, 128 - code if code < 0 else code)

    def kill_all(self) -> None:
        """End every process now, and wait until it is gone."""
        for running in self._running.values():
            _kill_group(running.process)
            running.process.wait()
            running.folder.remove_volumes()
        self._running.clear()

    def newest_log(self, job: str) -> Path | None:
        """What the newest of a job's first pods has written, where rank 0 runs; None where it had no pod."""
        return newest_log(self._pods, job)

    def _end(self, running: _Running, code: int) -> Exit:
        _kill_group(running.process)  # a container's other processes end with its first one
        self._free_gpus += running.devices
        message = running.folder.termination_message(code != 0)
        running.folder.remove_volumes()
        return Exit(code, message)

    def _program_of(self, pod: Object) -> Sequence[str]:
        """Arguments of Python: what trains is given from outside, what checks is what the container says."""
        if pod["metadata"].get("labels", {}).get(LABEL_COMPONENT) != PREFLIGHT:
            return self._program
        command: list[str] = pod["spec"]["containers"][0]["command"]
        return command[1:]

    def _spawn(self, pod: Object, folder: PodFolder, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        program = [sys.executable, *self._program_of(pod)]
        with folder.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), *program],
                cwd=folder.path,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own: Ctrl-C at the terminal is for us alone, and the whole group can be killed.
                start_new_session=True,
            )


def newest_log(pods: Path, job: str) -> Path | None:
    """As ProcessRuntime.newest_log, of a folder of pods."""
    names = re.compile(re.escape(job) + r"-0-[0-9a-z]+")
    logs = [log for log in pods.glob("*/log") if names.fullmatch(log.parent.name)]
    return max(logs, key=lambda log: log.stat().st_mtime, default=None)


def _with_absolute_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """The same, with a PYTHONPATH that also holds in the pod's folder."""
    paths = environ.get("PYTHONPATH", "").split(os.pathsep)
    absolute = os.pathsep.join(str(Path(path).absolute()) for path in paths if path)
    return {**environ, **({"PYTHONPATH": absolute} if absolute else {})}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the process and all that it started; what is gone already is fine."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
