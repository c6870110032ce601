"""Which S3 service jobs of this machine use: the one they name, the one of the environment, or an embedded one."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api import contract
from finetune_api.job import FineTuneJobSpec
from finetune_operator.cli.errors import CliError
from finetune_operator.cluster.seaweed import Endpoint, Seaweed, SeaweedError
from finetune_operator.references import places

ENDPOINT_VARIABLES = (contract.ENV_S3_ENDPOINT, "AWS_ENDPOINT_URL")
CREDENTIAL_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN")
TRAINER_STORAGE = ("-m", "finetune_trainer.storage")
"""Run as a program of its own: the control plane does not import the data plane or an S3 SDK."""


def uses_s3(spec: Mapping[str, Any]) -> bool:
    """Whether any address of the job is in a bucket."""
    return any(uri.startswith("s3://") for _, uri in places(FineTuneJobSpec.from_wire(spec)))


def of_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Variables for pods where the environment names a service or credentials; None where it does neither."""
    endpoint = next((environ[name] for name in ENDPOINT_VARIABLES if environ.get(name)), None)
    if endpoint is not None:
        path_style = environ.get(contract.ENV_S3_PATH_STYLE, "true")
        return {contract.ENV_S3_ENDPOINT: endpoint, contract.ENV_S3_PATH_STYLE: path_style}
    return {} if any(environ.get(name) for name in CREDENTIAL_VARIABLES) else None


def of_embedded(endpoint: Endpoint) -> dict[str, str]:
    """Variables for pods that use the embedded server."""
    return {
        contract.ENV_S3_ENDPOINT: endpoint.url,
        contract.ENV_S3_ACCESS_KEY_ID: endpoint.access_key,
        contract.ENV_S3_SECRET_ACCESS_KEY: endpoint.secret_key,
        contract.ENV_S3_PATH_STYLE: "true",
    }


def is_embedded(store: Mapping[str, str]) -> bool:
    """Whether these are the variables of the embedded server: only that one gives its keys away."""
    return contract.ENV_S3_SECRET_ACCESS_KEY in store


def of_spec(spec: Mapping[str, Any], store: Mapping[str, str]) -> dict[str, str]:
    """Variables that reach a job's S3 service from here."""
    s3 = spec["storage"]["s3"]
    named = {contract.ENV_S3_ENDPOINT: s3["endpoint"], contract.ENV_S3_PATH_STYLE: "true"} if s3.get("endpoint") else {}
    if s3.get("pathStyle") is False:
        named[contract.ENV_S3_PATH_STYLE] = "false"
    return {contract.ENV_S3_REGION: s3["region"], **named, **store}


@contextmanager
def embedded(folder: Path) -> Iterator[dict[str, str]]:
    """The embedded server over a folder while the block runs; one that runs over it already is used as it is."""
    running = _attach(folder)
    if running is not None:
        yield of_embedded(running)
        return
    with Seaweed() as seaweed:
        try:
            endpoint = seaweed.start(folder.resolve())
        except SeaweedError as error:
            raise CliError(str(error), 1) from error
        yield of_embedded(endpoint)


def run_storage(
    arguments: Sequence[str], store: Mapping[str, str], *, capture: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the trainer's storage on a store."""
    command = [sys.executable, *TRAINER_STORAGE, *arguments]
    pipe = subprocess.PIPE if capture else None
    return subprocess.run(command, env={**os.environ, **store}, stdout=pipe, stderr=pipe, check=False)


def _attach(folder: Path) -> Endpoint | None:
    """The server of a `finetune run` or `finetune storage serve` that is busy with this folder."""
    try:
        pid = int((folder / "weed.pid").read_text())
        keys = json.loads((folder / "keys.json").read_text())
        port = json.loads((folder / "ports.json").read_text())["s3"]
        if _owner_lives(folder) and Path(f"/proc/{pid}").exists():
            return Endpoint(f"http://127.0.0.1:{port}", keys["access_key"], keys["secret_key"])
    except (OSError, ValueError, KeyError):
        return None
    return None


def _owner_lives(folder: Path) -> bool:
    """The owner holds a lock for as long as it lives; a server whose owner is gone is not ours to use."""
    with (folder / "lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
