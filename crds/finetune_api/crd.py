"""The CustomResourceDefinition of FineTuneJob, built from its types. Pure; `finetune_operator.generate` writes it."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel

from finetune_api.job import FineTuneJobSpec, ObjectMeta
from finetune_api.job import FineTuneJob as Job
from finetune_api.schema import Schema, structural, without_defaults
from finetune_api.status import FineTuneJobStatus

GROUP = "finetune.dev"
VERSION = "v1alpha1"


def column(name: str, path: str, description: str, kind: str = "string", wide: bool = False) -> Schema:
    """A column of `kubectl get`; wide ones are shown by `-o wide` only."""
    found = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return {**found, "priority": 1} if wide else found


JOB_COLUMNS = (
    column("Strategy", ".spec.strategy.type", "Which parameters learn."),
    column("Phase", ".status.phase", "Where the job stands."),
    column("Step", ".status.progress.steps", "Optimizer steps done, of all."),
    column("Loss", ".status.progress.loss", "Newest training loss."),
    column("ETA", ".status.progress.eta", "Time left, as the last steps suggest."),
    column("Restarts", ".status.restarts.total", "Restarts, whatever caused them.", "integer"),
    column("Task", ".spec.task.type", "What is learned.", wide=True),
    column("Nodes", ".spec.resources.nodes", "Pods.", "integer", wide=True),
    column("GPUs", ".spec.resources.gpusPerNode", "GPUs of a pod.", "integer", wide=True),
    column("Model", ".spec.model.uri", "The model that training starts from.", wide=True),
    column("Checkpoint", ".status.checkpoint.step", "Step of the newest complete checkpoint.", "integer", wide=True),
    column("Reason", ".status.reason", "Why it stands there.", wide=True),
    column("Age", ".metadata.creationTimestamp", "Time since it was created.", "date"),
)


@cache
def job_schema() -> Schema:
    """The openAPIV3Schema of FineTuneJob. Shared by all callers: copy it before you change it."""
    description = " ".join((Job.__doc__ or "").split())
    return _root(description, FineTuneJobSpec, FineTuneJobStatus)


def build_crd() -> dict[str, Any]:
    """The whole CustomResourceDefinition, as JSON."""
    names = {
        "kind": "FineTuneJob",
        "listKind": "FineTuneJobList",
        "plural": "finetunejobs",
        "singular": "finetunejob",
        "shortNames": ["ftj"],
        "categories": ["finetune"],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": list(JOB_COLUMNS),
        "schema": {"openAPIV3Schema": job_schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names['plural']}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _root(description: str, spec: type[BaseModel], status: type[BaseModel]) -> Schema:
    """The top of every kind. A CRD may say nothing of metadata but the name's bounds: the rest is the server's."""
    name = structural(ObjectMeta)["properties"]["name"]
    return {
        "description": description,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": f"{GROUP}/{VERSION}.", "type": "string"},
            "kind": {"description": "Kind of the object.", "type": "string"},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": structural(spec),
            "status": without_defaults(structural(status)),
        },
    }
