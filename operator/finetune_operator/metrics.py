"""What the operator tells Prometheus about itself. Labels are few: phases, causes, kinds, methods, namespaces."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.status import TERMINAL, Phase, Restarts
from finetune_operator.cluster.port import Key, Object
from finetune_operator.cluster.rules import key_of
from finetune_operator.watches import WATCHED, Watches

PASS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: a pass is a few API requests of some milliseconds each; beyond ten the API server is in trouble."""
LAG_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds from news to what is written of it: under one as a rule, under five when a thousand jobs come at once."""
CAUSES = tuple(field.alias or name for name, field in Restarts.model_fields.items() if name != "total")
MAX_NAMESPACES = 500
"""Namespaces with figures of their own; further ones are added up under OTHERS."""
OTHERS = "(others)"
SECONDS_PER_HOUR = 3600.0


class Metrics:
    """The operator's own figures, in a registry of their own.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        registry = self.registry = CollectorRegistry()
        self.jobs = Jobs(clock)
        registry.register(self.jobs)
        self.pass_seconds = Histogram(
            "finetune_operator_reconcile_seconds", "Duration of a pass.", buckets=PASS_BUCKETS, registry=registry
        )
        self.errors = Counter("finetune_operator_reconcile_errors", "Passes that failed.", registry=registry)
        self.queue_depth = Gauge("finetune_operator_queue_depth", "Jobs that wait for a pass.", registry=registry)
        self.status_lag = Histogram(
            "finetune_operator_status_lag_seconds",
            "From the news about a job to the status that tells of it.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        self.restarts = Counter("finetune_operator_restarts", "Restarts of jobs.", ["cause"], registry=registry)
        self.finished = Counter(
            "finetune_operator_jobs_finished", "Jobs that have ended.", ["phase"], registry=registry
        )
        self.api_seconds = Histogram(
            "finetune_operator_api_request_seconds",
            "Duration of requests to the API server.",
            ["method"],
            buckets=PASS_BUCKETS,
            registry=registry,
        )
        self.api_requests = Counter(
            "finetune_operator_api_requests",
            "Requests to the API server; code 0: no answer came.",
            ["method", "code"],
            registry=registry,
        )
        self.leader = Gauge("finetune_operator_leader", "1 where this replica works.", registry=registry)
        for phase in sorted(TERMINAL):
            self.finished.labels(phase=phase.value)
        for cause in CAUSES:
            self.restarts.labels(cause=cause)

    def answered(self, method: str, code: int | None, seconds: float) -> None:
        """A request to the API server is over."""
        self.api_seconds.labels(method=method).observe(seconds)
        self.api_requests.labels(method=method, code=str(code or 0)).inc()

    def written(self, raw: Object, new: Object) -> None:
        """The status of a job was written.

        Args:
            raw: the job before.
            new: its status now.
        """
        old = raw.get("status") or {}
        self.jobs.see({**raw, "status": new})
        before, after = old.get("restarts") or {}, new.get("restarts") or {}
        for cause in CAUSES:
            self.restarts.labels(cause=cause).inc(max(0, after.get(cause, 0) - before.get(cause, 0)))
        if new.get("phase") in TERMINAL and old.get("phase") != new.get("phase"):
            self.finished.labels(phase=new["phase"]).inc()

    def watch(self, watches: Watches) -> None:
        """Show how the watches do."""
        self.registry.register(_WatchCollector(watches))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class Jobs(Collector):
    """Phases and GPU time of all jobs, as of their last status.

    GPU time is added up from when a job is seen Running until it is seen otherwise, so that a rate over it is the
    number of GPUs in use. It starts at 0 with every process, as counters do.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phases: dict[Key, str] = {}
        self._running: dict[Key, tuple[int, float]] = {}
        self._hours: dict[str, float] = {}
        self._told: set[Key] = set()

    def see(self, raw: Object) -> None:
        """A job as it is now."""
        self._told.add(key_of(raw))
        self._note(raw)

    def relist(self) -> None:
        """A LIST begins. It shows one moment and takes minutes with thousands of jobs: what is told of a job meanwhile
        is newer."""
        self._told = set()

    def listed(self, raw: Object) -> None:
        """A job as the LIST has it."""
        if key_of(raw) not in self._told:
            self._note(raw)

    def _note(self, raw: Object) -> None:
        key, phase, now = key_of(raw), str((raw.get("status") or {}).get("phase") or ""), self._clock()
        self._count(key, now)
        self._phases[key] = phase
        gpus = _gpus(raw["spec"]) if phase == Phase.RUNNING else 0
        if gpus:
            self._running[key] = gpus, now
        else:
            self._running.pop(key, None)

    def gone(self, key: Key) -> None:
        """It was deleted."""
        self._told.add(key)
        self._drop(key)

    def keep(self, keys: Iterable[Key]) -> None:
        """The LIST has ended: these exist, and what was told of meanwhile, and no others."""
        for key in self._phases.keys() - set(keys) - self._told:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self._count(key, self._clock())
        self._phases.pop(key, None)
        self._running.pop(key, None)

    def collect(self) -> Iterator[Metric]:
        now, tally = self._clock(), Tally(self._phases.values())
        jobs = GaugeMetricFamily("finetune_operator_jobs", "Jobs by phase.", labels=["phase"])
        for phase in Phase:
            jobs.add_metric([phase.value], tally[phase.value])
        yield jobs
        for key in list(self._running):
            self._count(key, now)
        hours = CounterMetricFamily("finetune_operator_gpu_hours", "GPU hours of running jobs.", labels=["namespace"])
        for namespace, value in self._hours.items():
            hours.add_metric([namespace], value)
        yield hours

    def _count(self, key: Key, now: float) -> None:
        if key not in self._running:
            return
        gpus, since = self._running[key]
        known = key.namespace in self._hours or len(self._hours) < MAX_NAMESPACES
        name = key.namespace if known else OTHERS
        self._hours[name] = self._hours.get(name, 0.0) + gpus * (now - since) / SECONDS_PER_HOUR
        self._running[key] = gpus, now


class _WatchCollector(Collector):
    def __init__(self, watches: Watches) -> None:
        self._watches = watches

    def collect(self) -> Iterator[Metric]:
        age = GaugeMetricFamily(
            "finetune_operator_watch_age_seconds", "Since the watch has delivered anything.", labels=["kind"]
        )
        lag = GaugeMetricFamily(
            "finetune_operator_watch_lag_seconds", "For which a change is known and was not delivered.", labels=["kind"]
        )
        for kind in WATCHED:
            age.add_metric([kind.kind], self._watches.age(kind))
            lag.add_metric([kind.kind], self._watches.lag(kind))
        yield age
        yield lag


def _gpus(spec: Mapping[str, Any]) -> int:
    resources = spec.get("resources") or {}
    return int(resources.get("nodes", 1)) * int(resources.get("gpusPerNode", 0))
