"""How the pods of a job reach each other: presets for the fabrics that clusters have."""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from finetune_api.common import Message, cel, form, ruled, rules

EXTENDED_RESOURCE = form(
    "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-A-Za-z0-9_.]+$", "must be an extended resource: domain/name"
)


class NetworkPreset(str, Enum):
    NONE = "None"
    SOCKETS = "Sockets"
    INFINIBAND = "InfiniBand"
    EFA = "EFA"
    TCPX = "TCPX"


class Network(Message):
    """What the pods need for the fabric between their nodes; see docs/network.md."""

    model_config = ruled(
        cel(
            "self.preset != 'None' || !has(self.interface)",
            "interface is a part of a preset; set preset to Sockets, or remove interface",
            at=".interface",
        ),
        cel(
            "self.preset == 'InfiniBand' || !has(self.resource)",
            "resource is for preset InfiniBand; remove it",
            at=".resource",
        ),
        cel(
            "self.preset in ['InfiniBand', 'EFA'] || !has(self.devices)",
            "devices is for the presets InfiniBand and EFA; remove it",
            at=".devices",
        ),
    )

    preset: NetworkPreset = Field(
        NetworkPreset.NONE,
        description="None: NCCL and gloo find their way themselves. Sockets: TCP alone. InfiniBand: InfiniBand or RoCE "
        "by a device plugin. EFA: Amazon's Elastic Fabric Adapter.",
        json_schema_extra=rules(
            cel(
                "self != 'TCPX'",
                "TCPX takes a daemon of Google's with privileges beside the trainer, which is not run; use Sockets",
            )
        ),
    )
    interface: str | None = Field(
        None,
        max_length=15,
        description="Network interface of the pod for TCP, such as eth0; absent: found by NCCL and gloo.",
        json_schema_extra=rules(form("^[A-Za-z0-9][-A-Za-z0-9._]*$", "must be the name of an interface, such as eth0")),
    )
    resource: str | None = Field(
        None,
        max_length=253,
        description="What the device plugin calls the InfiniBand devices; absent: rdma/hca_shared_devices_a.",
        json_schema_extra=rules(EXTENDED_RESOURCE),
    )
    devices: int | None = Field(None, ge=1, le=64, description="Devices of the fabric for a pod; absent: 1.")
