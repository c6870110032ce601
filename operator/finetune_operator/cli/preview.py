"""What a job will train, asked of the trainer, which builds the model from its config.json without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_operator.cli.store import embedded, of_environment, of_spec, run_storage
from finetune_operator.cluster.local.machine import StateFolder

TRAINER_PREVIEW = ("-m", "finetune_trainer.preview")
"""A program of its own: the control plane does not import torch."""
MOST_MODULES = 24
ELSEWHERE = {"pvc": "on a volume of the cluster", "hf": "on a hub", "job": "with another job"}


class UnknownError(Exception):
    """What will train cannot be told; the message says why."""


def what_trains(job: FineTuneJob, state_dir: Path) -> Iterator[str]:
    """What will train, in a few lines; or why that cannot be told from here."""
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        try:
            folder = _config_folder(job, Path(scratch), state_dir)
            yield from _lines(_ask(job, folder, Path(scratch)))
        except UnknownError as error:
            yield f"what will train is not known: {error}"


def _config_folder(job: FineTuneJob, scratch: Path, state_dir: Path) -> Path:
    """A folder with the model's config.json."""
    scheme, _, path = job.spec.model.uri.rstrip("/").partition("://")
    if scheme in ELSEWHERE:
        raise UnknownError(f"{job.spec.model.uri} lies {ELSEWHERE[scheme]}, out of this command's reach")
    if scheme == "file":
        if not Path(path, "config.json").is_file():
            raise UnknownError(f"there is no config.json in {path}")
        return Path(path)
    (scratch / "config.json").write_bytes(_read(f"s3://{path}/config.json", job, state_dir))
    return scratch


def _read(uri: str, job: FineTuneJob, state_dir: Path) -> bytes:
    spec = job.to_wire()["spec"]
    with _store(spec, StateFolder(state_dir).s3) as store:
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


def _ask(job: FineTuneJob, folder: Path, scratch: Path) -> dict[str, Any]:
    file = scratch / "job.json"
    file.write_text(json.dumps(resolve(job).to_wire()), "utf-8")
    command = [sys.executable, *TRAINER_PREVIEW, str(file), str(folder)]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
    if done.returncode:
        raise UnknownError(_last_line(done.stderr))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the trainer said nothing"


def _lines(preview: Mapping[str, Any]) -> Iterator[str]:
    trainable, total, share = preview["trainable"], preview["total"], preview["share"]
    yield f"will train {trainable:,} of {total:,} parameters ({share:.3%})"
    modules = preview["modules"]
    for module in modules[:MOST_MODULES]:
        where = f"blocks {module['layers']}: " if module.get("layers") else ""
        kind = f"{module['kind']}, " if module.get("kind") else ""
        yield f"  {where}{module['module']} ({kind}{module['parameters']:,})"
    if len(modules) > MOST_MODULES:
        yield f"  and {len(modules) - MOST_MODULES} more"
    for note in preview["notes"]:
        yield f"  {note}"
