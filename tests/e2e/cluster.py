"""The cluster behind KUBECONFIG, by kubectl, and what the tests are told about it by variables.

E2E_OPERATOR_IMAGE, E2E_TRAINER_IMAGE   images that its nodes can pull, or have: `make images`
E2E_S3_ENDPOINT                         an S3 service that pods and this machine reach, with AWS_ACCESS_KEY_ID and
                                        AWS_SECRET_ACCESS_KEY; or
E2E_HOST_ADDRESS                        an address of this machine that pods reach: an S3 server is started here
E2E_VALUES                              a YAML file with more values for the chart, as the cluster needs them
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.generate import crd_yaml

Object = dict[str, Any]
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


def kubectl(*arguments: str, stdin: Object | None = None, seconds: float = 60, may_fail: bool = False) -> str:
    """Standard output; raises AssertionError with standard error when kubectl fails and may not."""
    text = json.dumps(stdin) if stdin is not None else None
    run = subprocess.run(
        [kubectl_program(), *arguments], input=text, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert may_fail or run.returncode == 0, f"kubectl {' '.join(arguments)}: {run.stderr}"
    return run.stdout


def kubectl_program() -> str:
    """The one beside this Python first: its version is pinned."""
    beside = Path(sys.executable).with_name("kubectl")
    return str(beside) if beside.exists() else shutil.which("kubectl") or "kubectl"


def get(kind: str, name: str, namespace: str) -> Object:
    found: Object = json.loads(kubectl("-n", namespace, "get", kind, name, "-o", "json"))
    return found


def status_of(namespace: str, name: str) -> Object:
    """A job's status; empty while nothing has been said."""
    status: Object = get("ftj", name, namespace).get("status", {})
    return status


def items(kind: str, *arguments: str) -> list[Object]:
    found: list[Object] = json.loads(kubectl("get", kind, *arguments, "-o", "json"))["items"]
    return found


def apply(*objects: Object) -> None:
    kubectl("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": list(objects)})


def install_crd() -> None:
    """The CRD as the types say it now, ready for objects."""
    name = "crd/finetunejobs.finetune.dev"
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_load(crd_yaml()))
    # `wait` takes the conditions of a CRD that has none yet, which are null, for an error.
    kubectl("wait", "--for=jsonpath={.status.acceptedNames.kind}=FineTuneJob", name, "--timeout=30s")
    kubectl("wait", "--for=condition=Established", name, "--timeout=60s", seconds=90)


@contextmanager
def fresh_namespace(prefix: str) -> Iterator[str]:
    """A namespace that takes restricted pods only, deleted afterwards with all that is in it."""
    name = f"{prefix}-{secrets.token_hex(3)}"
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=true", "--timeout=120s", seconds=150)


def chart_images() -> Object:
    """Values that name the images under test."""
    return {"image": _image("E2E_OPERATOR_IMAGE"), "trainer": {"image": _image("E2E_TRAINER_IMAGE")}}


def more_values() -> Object:
    file = os.environ.get("E2E_VALUES")
    values: Object = yaml.safe_load(Path(file).read_text()) if file else {}
    return values


def _image(variable: str) -> Object:
    repository, _, tag = os.environ[variable].rpartition(":")
    return {"repository": repository, "tag": tag}
