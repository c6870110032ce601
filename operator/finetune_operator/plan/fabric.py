"""The fabric between a job's pods: environment, devices and rights of each preset. Pure.

Only what the fabric's own documentation asks of a pod; docs/network.md names the sources. The network of the host is
never used: pods keep names and NetworkPolicies of their own.
"""

from __future__ import annotations

from finetune_api.job import FineTuneJob
from finetune_api.network import Network, NetworkPreset
from finetune_operator.cluster.port import Object
from finetune_operator.settings import Settings

SHARED_HCA = "rdma/hca_shared_devices_a"
"""The name in the examples of Mellanox' shared device plugin."""
EFA = "vpc.amazonaws.com/efa"
ENVIRONMENT = {
    # Named, so that a device that is missing is an error and not a silent, slow TCP.
    NetworkPreset.SOCKETS: {"NCCL_NET": "Socket"},
    NetworkPreset.INFINIBAND: {"NCCL_NET": "IB"},
    # The data workers are forked, for which a provider that holds huge pages finds no second set of them.
    NetworkPreset.EFA: {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"},
}


def network_environment(job: FineTuneJob) -> dict[str, str]:
    """Variables for NCCL, gloo and libfabric."""
    network = _network(job)
    found = dict(ENVIRONMENT.get(network.preset, {}))
    if network.interface is not None:
        # NCCL takes prefixes of names, unless told that it is the whole one.
        found |= {"NCCL_SOCKET_IFNAME": f"={network.interface}", "GLOO_SOCKET_IFNAME": network.interface}
    return found


def network_devices(job: FineTuneJob) -> dict[str, str]:
    """Extended resources, by which a device plugin puts the fabric's devices into the pod."""
    network = _network(job)
    devices = str(network.devices or 1)
    if network.preset is NetworkPreset.INFINIBAND:
        return {network.resource or SHARED_HCA: devices}
    return {EFA: devices} if network.preset is NetworkPreset.EFA else {}


def network_rights(job: FineTuneJob, settings: Settings) -> Object:
    """What the container's security context needs beyond the restricted one; nothing unless the operator allows it.

    RDMA locks memory. Where the nodes' container runtime limits that, it takes IPC_LOCK, and Kubernetes gives added
    capabilities to root alone.
    """
    if _network(job).preset is not NetworkPreset.INFINIBAND or not settings.infiniband_ipc_lock:
        return {}
    return {"runAsUser": 0, "runAsNonRoot": False, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}


def _network(job: FineTuneJob) -> Network:
    return job.spec.resources.network or Network()
