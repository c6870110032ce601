"""The Job that checks a job before it starts: access, data, masks and memory, on a CPU, before a GPU is taken."""

from __future__ import annotations

from finetune_api.contract import TRAINER_CONTAINER, ExitCode
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.run import Preflight
from finetune_operator.cluster.port import Object
from finetune_operator.plan.names import PREFLIGHT, labels, metadata, preflight_name
from finetune_operator.plan.pod import pod_template
from finetune_operator.plan.volumes import quantity_bytes
from finetune_operator.settings import Settings

CPU = "1"
MEMORY = "4Gi"
"""Of the pod: for torch, a tokenizer and some rows; the model has no weights there."""
TRIES = 3
"""Pods that may fail for want of an answer from somebody, before the job does."""
LIMIT_SECONDS = 1800
"""How long the check may take, all tries and the wait for a place and an image together; then the job starts unchecked.
A check takes a minute or two: what is left is for large images, slow storage and nodes that are still to be added."""
KEPT_SECONDS = 3600
"""How long the Job and its log stay after it has ended."""
NEVER_RETRIED = (ExitCode.USAGE, ExitCode.DATA, ExitCode.NOPERM)
FOR_GPU_NODES = ("nodeSelector", "affinity")
"""What leads pods to GPUs, where this one does not belong."""


def wants_preflight(job: FineTuneJob) -> bool:
    """Whether the job is to be checked before it starts."""
    return is_wanted(job.spec)


def is_wanted(spec: FineTuneJobSpec) -> bool:
    """Whether a job with this spec is to be checked before it starts."""
    if spec.run_policy.preflight is not Preflight.AUTO:
        return spec.run_policy.preflight is Preflight.ALWAYS
    return spec.resources.gpus_per_node > 0 or spec.resources.nodes > 1


def preflight(job: FineTuneJob, settings: Settings) -> Object:
    """One pod like the trainer's, but small and without a GPU; of a resolved job."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(job, preflight_name(job.metadata.name), PREFLIGHT),
        "spec": {
            "completionMode": "Indexed",
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": TRIES - 1,
            "activeDeadlineSeconds": LIMIT_SECONDS,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": _template(job, settings),
        },
    }


def _failure_rules() -> list[Object]:
    codes = {"containerName": TRAINER_CONTAINER, "operator": "In", "values": sorted(map(int, NEVER_RETRIED))}
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": codes},
    ]


def _template(job: FineTuneJob, settings: Settings) -> Object:
    template = pod_template(job, settings, attempt=1)
    pod = {name: value for name, value in template["spec"].items() if name not in FOR_GPU_NODES}
    (trainer,) = pod["containers"]
    checker = {
        **trainer,
        "command": ["python", "-m", "finetune_trainer.preflight"],
        # On nodes with GPUs the runtime would show them to every pod whose image asks for it.
        "env": [*trainer["env"], {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}],
        "resources": _resources(job),
    }
    added = template["metadata"]["labels"]
    return {
        "metadata": {**template["metadata"], "labels": {**added, **labels(job, PREFLIGHT)}},
        "spec": {**pod, "containers": [checker], "terminationGracePeriodSeconds": 30},
    }


def _resources(job: FineTuneJob) -> Object:
    """Never more than the job itself asks for."""
    asked = job.spec.resources
    memory = MEMORY if quantity_bytes(asked.memory) > quantity_bytes(MEMORY) else asked.memory
    cpu = CPU if quantity_bytes(asked.cpu) > quantity_bytes(CPU) else asked.cpu
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}
