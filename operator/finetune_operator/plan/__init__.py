"""job -> Kubernetes objects. Pure: the same job and settings give the same manifests, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import Object
from finetune_operator.plan.network import network_policy
from finetune_operator.plan.objects import config_map, service, workload
from finetune_operator.plan.preflight import preflight, wants_preflight
from finetune_operator.references import with_places
from finetune_operator.settings import Settings

__all__ = ["Manifests", "plan"]


@dataclass(frozen=True)
class Manifests:
    """What a job becomes, in the order of creation."""

    config_map: Object
    network_policy: Object | None
    """Where the installation has them."""
    preflight: Object | None
    """The Job that checks the job first; None where none is wanted."""
    service: Object | None
    """Where there are several pods, which find each other by it."""
    workload: Object
    """The Indexed Job; create-only, since its pod template cannot be changed."""

    def all(self) -> tuple[Object, ...]:
        found = (*self.needs_of_preflight(), self.preflight, self.service, self.workload)
        return tuple(manifest for manifest in found if manifest is not None)

    def needs_of_preflight(self) -> tuple[Object, ...]:
        """What must be there before the pod that checks the job: it is fenced off as the job's own pods are."""
        return (self.config_map,) if self.network_policy is None else (self.config_map, self.network_policy)

    def needs(self) -> tuple[Object, ...]:
        """What must be there before the pods."""
        return self.needs_of_preflight() if self.service is None else (*self.needs_of_preflight(), self.service)


def plan(job: FineTuneJob, settings: Settings, attempt: int = 1) -> Manifests:
    """The objects of one attempt of a job; metadata.uid of the job goes into their owner references."""
    resolved = resolve(with_places(job))
    return Manifests(
        config_map(resolved),
        network_policy(resolved, settings),
        preflight(resolved, settings) if wants_preflight(resolved) else None,
        service(resolved) if resolved.spec.resources.nodes > 1 else None,
        workload(resolved, settings, attempt),
    )
