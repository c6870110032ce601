"""Which nodes the pods are to run on."""

from __future__ import annotations

from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import Object
from finetune_operator.plan.names import selector

REQUIRED, PREFERRED = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))
REPEATEDLY = 2


def affinity(job: FineTuneJob) -> Object | None:
    """The job's own, with its pods together, and away from nodes where it has failed repeatedly.

    Away only by preference: where there is no other node, a bad one is better than none. Not in a queue, which chooses
    nodes itself and takes a Job that was changed for another one.
    """
    own = _together(job)
    avoided = sorted(node for node, times in job.status.node_failures.items() if times >= REPEATEDLY)
    if not avoided or job.spec.scheduling.queue is not None:
        return own
    # A field selector takes one value at a time.
    elsewhere = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in avoided]
    term = {"weight": 100, "preference": {"matchFields": elsewhere}}
    nodes: Object = dict((own or {}).get("nodeAffinity") or {})
    return {**(own or {}), "nodeAffinity": {**nodes, PREFERRED: [*nodes.get(PREFERRED, []), term]}}


def _together(job: FineTuneJob) -> Object | None:
    """The scheduler takes the first pod for the one that the others must be near to."""
    own, key = job.spec.scheduling.affinity, job.spec.scheduling.topology_key
    if key is None:
        return own
    near: Object = dict((own or {}).get("podAffinity") or {})
    term = {"labelSelector": {"matchLabels": selector(job.metadata.name)}, "topologyKey": key}
    return {**(own or {}), "podAffinity": {**near, REQUIRED: [*near.get(REQUIRED, []), term]}}
