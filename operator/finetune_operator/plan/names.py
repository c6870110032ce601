"""Names, labels and ownership of a job's children."""

from __future__ import annotations

from finetune_api.contract import LABEL_COMPONENT, LABEL_JOB
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import FINE_TUNE_JOB, Object

MANAGER = "finetune-operator"
COMPONENT = "trainer"
PREFLIGHT = "preflight"
"""Component of the pod that checks a job before it starts."""


def config_map_name(job_name: str) -> str:
    """The ConfigMap that holds job.json; not the job's own name, which people give to ConfigMaps of theirs."""
    return f"{job_name}-job"


def workload_name(job_name: str) -> str:
    """The Indexed Job and, since pod names resolve through it, the headless Service."""
    return job_name


def preflight_name(job_name: str) -> str:
    """The Job that checks a job before it starts."""
    return f"{job_name}-preflight"


def master_address(job: FineTuneJob, domain: str) -> str:
    """Full DNS name of index 0's pod: the Job controller gives pods the hostname <job>-<index>."""
    name = workload_name(job.metadata.name)
    return f"{name}-0.{name}.{job.metadata.namespace}.svc.{domain}"


def labels(job: FineTuneJob, component: str = COMPONENT) -> dict[str, str]:
    """On every child."""
    return {
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/instance": job.metadata.name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": MANAGER,
        LABEL_JOB: job.metadata.name,
        LABEL_COMPONENT: component,
    }


def selector(job_name: str, component: str = COMPONENT) -> dict[str, str]:
    """Selects the pods of one job."""
    return {LABEL_JOB: job_name, LABEL_COMPONENT: component}


def metadata(job: FineTuneJob, name: str, component: str = COMPONENT) -> Object:
    """Metadata of a child: the controller reference lets the cluster collect it when the job is deleted.

    Without blockOwnerDeletion: where a cluster guards it, setting it takes a permission on the job's finalizers.
    """
    return {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": labels(job, component),
        "ownerReferences": [
            {
                "apiVersion": FINE_TUNE_JOB.api_version,
                "kind": FINE_TUNE_JOB.kind,
                "name": job.metadata.name,
                "uid": job.metadata.uid,
                "controller": True,
            }
        ],
    }
