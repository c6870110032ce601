"""The NetworkPolicy of a job: its pods hear each other and the operator, and nobody else."""

from __future__ import annotations

from finetune_api.contract import LABEL_JOB, PROGRESS_PORT
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import NETWORK_POLICY, Object
from finetune_operator.plan.names import metadata, workload_name
from finetune_operator.settings import Gate, Settings

DNS_PORT = 53


def network_policy(job: FineTuneJob, settings: Settings) -> Object | None:
    """None where the installation bounds nothing."""
    gate = settings.gate()
    if gate is None:
        return None
    gang = {"podSelector": {"matchLabels": {LABEL_JOB: job.metadata.name}}}
    spec: Object = {**gang, "policyTypes": ["Ingress"], "ingress": _ingress(gang, gate)}
    if gate.egress:
        spec["policyTypes"].append("Egress")
        spec["egress"] = [{"to": [gang]}, {"ports": _dns()}, *gate.egress]
    return {
        "apiVersion": NETWORK_POLICY.api_version,
        "kind": NETWORK_POLICY.kind,
        "metadata": metadata(job, workload_name(job.metadata.name)),
        "spec": spec,
    }


def _ingress(gang: Object, gate: Gate) -> list[Object]:
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": gate.operatorNamespace}},
        "podSelector": {"matchLabels": gate.operatorLabels},
    }
    return [
        # On all ports: NCCL and gloo listen wherever the kernel lets them.
        {"from": [gang]},
        {"from": [operator], "ports": [{"port": PROGRESS_PORT, "protocol": "TCP"}]},
        *gate.ingress,
    ]


def _dns() -> list[Object]:
    """To any address: where DNS is served from differs from cluster to cluster."""
    return [{"port": DNS_PORT, "protocol": protocol} for protocol in ("UDP", "TCP")]
