"""The CustomResourceDefinition of FineTuneJob, built from its types. Pure; `finetune_operator.generate` writes it."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel

from finetune_api.contract import GROUP, VERSION
from finetune_api.job import FineTuneJob
from finetune_api.schema import RULES, Schema, structural, without_defaults


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
    column("Age", ".metadata.creationTimestamp", "Time since it was created.", "date"),
    column("Task", ".spec.task.type", "What is learned.", wide=True),
    column("Nodes", ".spec.resources.nodes", "Pods.", "integer", wide=True),
    column("GPUs", ".spec.resources.gpusPerNode", "GPUs of a pod.", "integer", wide=True),
    column("Model", ".spec.model.uri", "The model that training starts from.", wide=True),
    column("Checkpoint", ".status.checkpoint.step", "Step of the newest complete checkpoint.", "integer", wide=True),
    column("Reason", ".status.reason", "Why it stands there.", wide=True),
)


@cache
def job_schema() -> Schema:
    """The openAPIV3Schema of FineTuneJob. Shared by all callers: copy it before you change it."""
    return _root(FineTuneJob)


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


def _root(kind: type[BaseModel]) -> Schema:
    """The top of a kind. A CRD may say nothing of metadata but the name's bounds: the rest is the server's."""
    schema = structural(kind)
    parts = schema["properties"]
    name = {key: value for key, value in parts["metadata"]["properties"]["name"].items() if key != "description"}
    return {
        "description": schema["description"],
        "type": "object",
        "required": ["spec"],
        RULES: schema.get(RULES, []),
        "properties": {
            "apiVersion": {"description": f"{GROUP}/{VERSION}.", "type": "string"},
            "kind": {"description": f"{kind.__name__}.", "type": "string"},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": parts["spec"],
            "status": without_defaults(parts["status"]),
        },
    }
