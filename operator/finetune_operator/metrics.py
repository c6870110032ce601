"""What the operator tells Prometheus about itself."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from finetune_api.status import Phase

PASS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: a pass is a few API requests of some milliseconds each; beyond ten the API server is in trouble."""


class Metrics:
    """The operator's own figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pass_seconds = Histogram(
            "finetune_operator_reconcile_seconds", "Duration of a pass.", buckets=PASS_BUCKETS, registry=self.registry
        )
        self.errors = Counter("finetune_operator_reconcile_errors", "Passes that failed.", registry=self.registry)
        self.queue_depth = Gauge("finetune_operator_queue_depth", "Jobs that wait for a pass.", registry=self.registry)
        self.jobs = Gauge("finetune_operator_jobs", "Jobs by phase.", ["phase"], registry=self.registry)

    def count_phases(self, phases: Iterable[str]) -> None:
        """The phases of all jobs; one that no job is in shows 0."""
        tally = Tally(phases)
        for phase in Phase:
            self.jobs.labels(phase=phase.value).set(tally[phase.value])

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
