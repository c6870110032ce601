"""What the fabric between nodes asks of a process: locked memory."""

from __future__ import annotations

import resource
from pathlib import Path

from finetune_api.job import FineTuneJobSpec
from finetune_api.network import NetworkPreset

CAP_IPC_LOCK = 14
"""From <linux/capability.h>."""
ENOUGH_BYTES = 2**30


def locked_memory_warning(spec: FineTuneJobSpec, status: Path = Path("/proc/self/status")) -> str | None:
    """Why RDMA may fail to register its buffers; None where nothing speaks against it."""
    network = spec.resources.network
    if network is None or network.preset is not NetworkPreset.INFINIBAND:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= ENOUGH_BYTES or _may_lock(status):
        return None
    return (
        f"this pod may lock {limit // 1024} KiB of memory, which is too little for InfiniBand; raise memlock in the "
        "nodes' container runtime, or set the operator's infinibandIpcLock (docs/network.md)"
    )


def _may_lock(status: Path) -> bool:
    """Whether the process has CAP_IPC_LOCK, to which the limit does not apply."""
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return bool(int(lines.get("CapEff", "0"), 16) >> CAP_IPC_LOCK & 1)
