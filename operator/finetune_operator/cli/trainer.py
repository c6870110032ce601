"""What the trainer can tell of a job from the model's config.json alone; asked as a program of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_operator.cli.store import embedded, of_environment, of_spec, run_storage
from finetune_operator.cluster.local.machine import StateFolder

ELSEWHERE = {"pvc": "on a volume of the cluster", "hf": "on a hub", "job": "with another job"}


class UnknownError(Exception):
    """It cannot be told; the message says why."""


@dataclass(frozen=True)
class Question:
    """A job, and where its model's config.json is found.

    Attributes:
        scratch: an empty folder for what is asked with.
        config: a config.json that stands for the model's; None: read from model.uri.
    """

    job: FineTuneJob
    state_dir: Path
    scratch: Path
    config: Path | None = None

    def ask(self, module: str, *more: str) -> dict[str, Any]:
        """Run a module of the trainer with job.json, the model's folder and more; its JSON answer.

        The control plane does not import torch. Raises UnknownError.
        """
        file = self.scratch / "job.json"
        file.write_text(json.dumps(resolve(self.job).to_wire()), "utf-8")
        command = [sys.executable, "-m", module, str(file), str(self._config_folder()), *more]
        done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
        if done.returncode:
            raise UnknownError(_last_line(done.stderr))
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _config_folder(self) -> Path:
        """A folder with the model's config.json."""
        if self.config is not None:
            return self._given(self.config)
        scheme, _, path = self.job.spec.model.uri.rstrip("/").partition("://")
        if scheme in ELSEWHERE:
            raise UnknownError(
                f"{self.job.spec.model.uri} lies {ELSEWHERE[scheme]}, out of this command's reach; give --config"
            )
        if scheme == "file":
            if not Path(path, "config.json").is_file():
                raise UnknownError(f"there is no config.json in {path}")
            return Path(path)
        (self.scratch / "config.json").write_bytes(self._read(f"s3://{path}/config.json"))
        return self.scratch

    def _given(self, config: Path) -> Path:
        if not config.is_file():
            raise UnknownError(f"--config: there is no file {config}")
        if config.name == "config.json":
            return config.parent
        shutil.copy(config, self.scratch / "config.json")
        return self.scratch

    def _read(self, uri: str) -> bytes:
        spec = self.job.to_wire()["spec"]
        with _store(spec, StateFolder(self.state_dir).s3) as store:
            done = run_storage(["cat", uri], of_spec(spec, store), capture=True)
        if done.returncode:
            raise UnknownError(_last_line(done.stderr).removeprefix("error: "))
        return done.stdout


def _store(spec: Mapping[str, Any], folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    found = {} if spec["storage"]["s3"].get("endpoint") else of_environment(os.environ)
    if found is not None:
        return nullcontext(found)
    if folder.is_dir():
        return embedded(folder)
    raise UnknownError("neither the job nor the environment names an S3 endpoint, such as AWS_ENDPOINT_URL_S3")


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the trainer said nothing"
