"""ConfigMap, headless Service and Indexed Job of a FineTuneJob."""

from __future__ import annotations

import json

from finetune_api.contract import LABEL_QUEUE, NEVER_RETRIED, PROGRESS_PORT, RENDEZVOUS_PORT, TRAINER_CONTAINER
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import Object
from finetune_operator.plan.names import config_map_name, metadata, selector, workload_name
from finetune_operator.plan.pod import pod_template
from finetune_operator.settings import Settings

JOB_KEY = "job.json"
NO_LIMIT = 2**31 - 1


def job_document(job: FineTuneJob) -> str:
    """job.json: the resolved job as the trainer reads it, without what changes while it runs."""
    spec = job.spec.to_wire()
    del spec["suspend"]
    identity = {"name": job.metadata.name, "namespace": job.metadata.namespace, "uid": job.metadata.uid}
    document = {"apiVersion": job.api_version, "kind": job.kind, "metadata": identity, "spec": spec}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def config_map(job: FineTuneJob) -> Object:
    """The resolved job; updated with what may change of the spec, which running pods see within a minute."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, config_map_name(job.metadata.name)),
        "data": {JOB_KEY: job_document(job)},
    }


def service(job: FineTuneJob) -> Object:
    """Headless, so that every pod has a DNS name; before it is ready, since ranks meet before they can be. A single
    pod needs none, and with a Service go its EndpointSlice and the writes that this takes."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job, workload_name(job.metadata.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(job.metadata.name),
            "ports": [
                {"name": "rendezvous", "port": RENDEZVOUS_PORT, "targetPort": RENDEZVOUS_PORT, "protocol": "TCP"},
                {"name": "progress", "port": PROGRESS_PORT, "targetPort": PROGRESS_PORT, "protocol": "TCP"},
            ],
        },
    }


def workload(job: FineTuneJob, settings: Settings, attempt: int) -> Object:
    """ONE Indexed Job, so that queues see one workload.

    Its own retries are without limit: budgets are the operator's alone, which holds them by cause.
    """
    nodes, managed_by = job.spec.resources.nodes, job.spec.scheduling.managed_by
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _workload_metadata(job),
        "spec": {
            **({"managedBy": managed_by} if managed_by else {}),
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            # A queue starts what is in it.
            "suspend": job.spec.suspend or job.spec.scheduling.queue is not None,
            "backoffLimitPerIndex": NO_LIMIT,
            # A pod is replaced when it has ended, never while it still saves.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": pod_template(job, settings, attempt),
        },
    }


def _workload_metadata(job: FineTuneJob) -> Object:
    own, queue = metadata(job, workload_name(job.metadata.name)), job.spec.scheduling.queue
    return {**own, "labels": {**own["labels"], LABEL_QUEUE: queue}} if queue else own


def _failure_rules() -> list[Object]:
    """The first match counts. The second rule names its container: injected sidecars do not speak for the job."""
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": TRAINER_CONTAINER,
                "operator": "In",
                "values": sorted(int(code) for code in NEVER_RETRIED),
            },
        },
    ]
