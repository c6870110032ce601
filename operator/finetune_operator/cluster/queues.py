"""A queue in which there is room for everybody: what Kueue is to a cluster, on a machine that has nobody else."""

from __future__ import annotations

from finetune_api.contract import ANNOTATION_STOPPING, LABEL_QUEUE
from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import JOB, Object
from finetune_operator.cluster.rules import key_of


class OpenQueue:
    """Resumes every Job that is in a queue, when the Job controller has seen its suspension and nobody is at it."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster

    async def sync(self) -> None:
        """Look at every Job once."""
        for job in await self._cluster.list(JOB, None, {LABEL_QUEUE: ""}):
            stopping = ANNOTATION_STOPPING in (job["metadata"].get("annotations") or {})
            if job["spec"].get("suspend") and _is_seen(job) and not stopping:
                guard = {"op": "test", "path": "/metadata/uid", "value": job["metadata"]["uid"]}
                resume = {"op": "replace", "path": "/spec/suspend", "value": False}
                await self._cluster.patch(JOB, key_of(job), [guard, resume])


def _is_seen(job: Object) -> bool:
    conditions = (job.get("status") or {}).get("conditions", [])
    return any(item["type"] == "Suspended" and item["status"] == "True" for item in conditions)
