"""Pod template of a job: restricted, so that it runs in namespaces that enforce the strictest pod security."""

from __future__ import annotations

from typing import Any

from finetune_api.contract import (
    ANNOTATION_ATTEMPT,
    ANNOTATION_NODES,
    PROGRESS_PORT,
    TERMINATION_LOG,
    TRAINER_CONTAINER,
)
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import Object
from finetune_operator.plan.environment import environment
from finetune_operator.plan.fabric import network_devices, network_rights
from finetune_operator.plan.names import labels, workload_name
from finetune_operator.plan.nodes import affinity
from finetune_operator.plan.volumes import volumes
from finetune_operator.settings import Settings

USER = 65532
"""`nonroot` of distroless images and of ours; the group owns the volumes."""
NODE_LOSS_SECONDS = 30
"""How long a pod stays bound to a node that went silent; Kubernetes' default of 300 costs a gang five minutes."""
GPU_PRODUCT_LABEL = "nvidia.com/gpu.product"


RESTRICTED: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""What Pod Security's strictest level asks of every container."""


def pod_template(job: FineTuneJob, settings: Settings, attempt: int) -> Object:
    """Metadata and spec of the pods; attempt and nodes alone change later, by patch while suspended."""
    added, nodes = job.spec.additions, job.spec.resources.nodes
    return {
        "metadata": {
            "labels": {**added.labels, **labels(job)},
            "annotations": {**added.annotations, ANNOTATION_ATTEMPT: str(attempt), ANNOTATION_NODES: str(nodes)},
        },
        "spec": _pod_spec(job, settings),
    }


def _pod_spec(job: FineTuneJob, settings: Settings) -> Object:
    scheduling, storage, added = job.spec.scheduling, job.spec.storage, job.spec.additions
    spec: Object = {
        "restartPolicy": "Never",
        "subdomain": workload_name(job.metadata.name) if job.spec.resources.nodes > 1 else None,
        "terminationGracePeriodSeconds": job.spec.run_policy.termination_grace_period_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(job),
        "tolerations": _tolerations(job),
        "nodeSelector": _node_selector(job),
        "initContainers": _init_containers(job),
        "containers": [_trainer(job, settings)],
        "volumes": [item.volume for item in volumes(job)] + added.volumes,
        "serviceAccountName": storage.service_account_name,
        "priorityClassName": scheduling.priority_class_name,
        "schedulerName": scheduling.scheduler_name,
        "affinity": affinity(job),
        "imagePullSecrets": _pull_secrets(job, settings),
    }
    return _present(spec)


def _trainer(job: FineTuneJob, settings: Settings) -> Object:
    return {
        "name": TRAINER_CONTAINER,
        # Of a job that is under way an upgrade changes nothing.
        "image": job.status.trainer_image or settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "finetune_trainer.launch"],
        "env": environment(job, settings),
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
        "resources": _resources(job),
        "volumeMounts": [item.mount for item in volumes(job)] + job.spec.additions.volume_mounts,
        "securityContext": {**RESTRICTED, "readOnlyRootFilesystem": True, **network_rights(job, settings)},
        "terminationMessagePath": TERMINATION_LOG,
        # A trainer that could not even start leaves no message: then the end of its log says why.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _pull_secrets(job: FineTuneJob, settings: Settings) -> list[Object]:
    """The job's own first; each once, since the API server takes a list with two of a name, and then loses one."""
    own = job.spec.additions.image_pull_secrets
    return [{"name": name} for name in dict.fromkeys([*own, *settings.image_pull_secrets])]


def _resources(job: FineTuneJob) -> Object:
    """Memory is limited to what was asked for, processors are not: idle ones cost nobody anything."""
    resources = job.spec.resources
    fixed = {"memory": resources.memory}
    if resources.gpus_per_node:
        fixed[resources.gpu_resource] = str(resources.gpus_per_node)
    fixed |= network_devices(job)
    return {"requests": {"cpu": resources.cpu, **fixed}, "limits": fixed}


def _init_containers(job: FineTuneJob) -> list[Object]:
    """The job's own, as restricted as the trainer, but that they may write into their image."""
    return [{**item, "securityContext": RESTRICTED} for item in job.spec.additions.init_containers]


def _pod_security(job: FineTuneJob) -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        # Large volumes are not walked file by file at every start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
        **(job.spec.additions.security_context or {}),
    }


def _tolerations(job: FineTuneJob) -> list[Object]:
    lost = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NODE_LOSS_SECONDS,
        }
        for state in ("not-ready", "unreachable")
    ]
    resources = job.spec.resources
    gpu = [{"key": resources.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    return [*lost, *(gpu if resources.gpus_per_node else []), *job.spec.scheduling.tolerations]


def _node_selector(job: FineTuneJob) -> dict[str, str]:
    product = job.spec.resources.gpu_product
    return {**job.spec.scheduling.node_selector, **({GPU_PRODUCT_LABEL: product} if product else {})}


def _present(spec: dict[str, Any]) -> Object:
    """Without what is not asked for, so that manifests show only what was meant."""
    return {name: value for name, value in spec.items() if value not in (None, {}, [])}
