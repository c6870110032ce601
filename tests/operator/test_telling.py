"""What the operator tells of itself: metrics and log lines."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from finetune_operator import logs
from finetune_operator.cluster.port import Key, Object
from finetune_operator.metrics import MAX_NAMESPACES, OTHERS, Metrics
from finetune_operator.settings import Settings
from tests.operator.test_election import Time
from tests.operator.world import World


def job(namespace: str, name: str, phase: str, gpus: int = 8, nodes: int = 1, **status: Any) -> Object:
    spec = {"resources": {"nodes": nodes, "gpusPerNode": gpus}}
    return {"metadata": {"namespace": namespace, "name": name}, "spec": spec, "status": {"phase": phase, **status}}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_gpu_hours_are_those_of_running_jobs_by_namespace() -> None:
    time = Time()
    metrics = Metrics(time)
    metrics.jobs.see(job("ml", "a", "Running", gpus=8, nodes=2))
    metrics.jobs.see(job("ml", "b", "Starting"))
    time.now += 1800
    assert value(metrics, "finetune_operator_gpu_hours_total", namespace="ml") == 8.0
    time.now += 1800
    metrics.jobs.see(job("ml", "a", "Suspended", gpus=8, nodes=2))
    time.now += 7200
    assert value(metrics, "finetune_operator_gpu_hours_total", namespace="ml") == 16.0


def test_gpu_hours_of_a_deleted_job_stay_and_grow_no_more() -> None:
    time = Time()
    metrics = Metrics(time)
    metrics.jobs.see(job("ml", "a", "Running", gpus=1))
    time.now += 3600
    metrics.jobs.gone(Key("ml", "a"))
    time.now += 3600
    assert value(metrics, "finetune_operator_gpu_hours_total", namespace="ml") == 1.0


def test_what_is_told_of_a_job_while_a_list_is_read_is_newer_than_the_list() -> None:
    jobs = (metrics := Metrics()).jobs
    for name in ("written", "deleted", "missed"):
        jobs.see(job("ml", name, "Starting"))
    jobs.relist()
    jobs.see(job("ml", "written", "Running"))
    jobs.see(job("ml", "created", "Queued"))
    jobs.gone(Key("ml", "deleted"))
    for name in ("written", "deleted", "unknown"):
        jobs.listed(job("ml", name, "Starting"))
    jobs.keep(Key("ml", name) for name in ("written", "deleted", "unknown"))
    phases = {
        phase: value(metrics, "finetune_operator_jobs", phase=phase) for phase in ("Starting", "Running", "Queued")
    }
    assert phases == {"Starting": 1, "Running": 1, "Queued": 1}


def test_ever_more_namespaces_do_not_become_ever_more_labels() -> None:
    time = Time()
    metrics = Metrics(time)
    for number in range(MAX_NAMESPACES + 10):
        metrics.jobs.see(job(f"ns-{number}", "a", "Running", gpus=1))
    time.now += 3600
    text = metrics.text().decode()
    assert text.count("finetune_operator_gpu_hours_total{") == MAX_NAMESPACES + 1
    assert value(metrics, "finetune_operator_gpu_hours_total", namespace=OTHERS) == 10.0


def test_restarts_are_counted_by_cause_as_statuses_count_them() -> None:
    metrics = Metrics()
    before = job("ml", "a", "Running", restarts={"total": 1, "disruption": 1, "outOfMemory": 0})
    metrics.written(before, {"phase": "Restarting", "restarts": {"total": 2, "disruption": 1, "outOfMemory": 1}})
    assert value(metrics, "finetune_operator_restarts_total", cause="outOfMemory") == 1
    assert value(metrics, "finetune_operator_restarts_total", cause="disruption") == 0


def test_an_end_is_counted_once() -> None:
    metrics = Metrics()
    metrics.written(job("ml", "a", "Running"), {"phase": "Failed"})
    metrics.written(job("ml", "a", "Failed"), {"phase": "Failed", "message": "more"})
    assert value(metrics, "finetune_operator_jobs_finished_total", phase="Failed") == 1


async def test_a_pass_that_writes_tells_how_late_it_is_and_one_that_does_not_is_silent() -> None:
    world = World()
    await world.create()
    await world.settle()
    metrics = world.engine._metrics
    assert value(metrics, "finetune_operator_status_lag_seconds_count") == 0
    await world.set_suspend(True)
    world.engine.put(Key("ml", "tune"))
    world.clock.forward(2.5)
    await world.engine._work(Key("ml", "tune"))
    await world.node.settle()
    await world.engine._work(Key("ml", "tune"))
    assert value(metrics, "finetune_operator_status_lag_seconds_bucket", le="1.0") == 1
    assert value(metrics, "finetune_operator_status_lag_seconds_sum") == 2.5


def test_a_line_about_a_job_names_it_and_its_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.configure(Settings(log_format="json"))
        with logs.about(Key("ml", "tune")):
            logs.of_attempt(3)
            logging.getLogger("finetune_operator").info("within")
        logging.getLogger("finetune_operator").info("without")
    finally:
        root.handlers, root.level = handlers, level
    within, without = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert {key: within.get(key) for key in ("namespace", "job", "attempt")} == {
        "namespace": "ml", "job": "tune", "attempt": 3,
    }  # fmt: skip
    assert not {"namespace", "job", "attempt"} & without.keys()
