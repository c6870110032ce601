"""What jobs need of this machine, found missing before anything is started."""

from __future__ import annotations

import os
from collections.abc import Sequence

from finetune_api import contract
from finetune_api.status import TERMINAL
from finetune_operator.cli.documents import Document
from finetune_operator.cli.errors import CliError
from finetune_operator.cluster.local.runtime import machine_gpus
from finetune_operator.cluster.port import Object
from finetune_operator.cluster.rules import key_of


def require(document: Document, job: Object) -> None:
    """Raise CliError where this machine cannot give the job what it asks for."""
    _gpus(document, job)
    _containers(document, job)
    _keys(document, job)


def require_different(documents: list[Document], jobs: list[Object]) -> None:
    """Raise CliError where two documents are of one name: the second would be an update of the first."""
    seen: dict[str, str] = {}
    for document, job in zip(documents, jobs, strict=True):
        name = str(key_of(job))
        if name in seen:
            raise CliError(f"{document.place}: the job {name} stands at {seen[name]} already; give it another name")
        seen[name] = document.place


def require_ended(earlier: Sequence[Object]) -> None:
    """Raise CliError where a job of another file, which is named, has not ended: nothing of it runs meanwhile."""
    for job in earlier:
        phase = (job.get("status") or {}).get("phase")
        if phase not in TERMINAL:
            raise CliError(
                f"job://{job['metadata']['name']}: this job has not ended, it is {phase or 'new'}; run its file to the "
                "end first, or put all these jobs into one file"
            )


def _gpus(document: Document, job: Object) -> None:
    """Fewer GPUs than the pods ask for would be waited for without end."""
    resources, present = job["spec"]["resources"], len(machine_gpus())
    wanted, nodes = resources["gpusPerNode"], resources["nodes"]
    if wanted * nodes > present:
        asked = f"spec.resources.gpusPerNode is {wanted}" + (f" and spec.resources.nodes {nodes}" if nodes > 1 else "")
        raise CliError(
            f"{document.place}: {asked}, and this machine has {present} GPU(s); set it to what there is, or to 0 for "
            "the CPU"
        )


def _containers(document: Document, job: Object) -> None:
    """Pods are processes here, and what stands in an image is nowhere."""
    if (job["spec"].get("podTemplate") or {}).get("initContainers"):
        raise CliError(
            f"{document.place}: spec.podTemplate.initContainers are containers of other images, which this machine "
            "does not run; remove them here, and do by hand what they do"
        )


def _keys(document: Document, job: Object) -> None:
    """A Secret that nothing on this machine stands for."""
    s3 = job["spec"]["storage"]["s3"]
    missing = [key for key in contract.SECRET_KEYS[:2] if not os.environ.get(key)]
    if s3.get("secretName") and s3.get("endpoint") and missing:
        raise CliError(
            f"{document.place}: spec.storage.s3.secretName names a Secret, which this machine does not have; "
            f"export {' and '.join(missing)} instead"
        )
