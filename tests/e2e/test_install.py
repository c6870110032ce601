"""From `helm install` to a tuned adapter in the bucket and back to nothing, under restricted pod security.

The operator watches one namespace alone here, so it runs with the chart's namespaced Role: whatever permission it
lacks, these tests notice. They are the steps of one story, in this order.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest

from tests.chart.rendering import CHART, ROOT, merged
from tests.e2e.cluster import (
    Object,
    apply,
    chart_images,
    fresh_namespace,
    get,
    items,
    kubectl,
    kubectl_program,
    more_values,
)
from tests.e2e.conftest import ClusterS3
from tests.support.models import greetings, save_tiny_llama

RELEASE = "finetune"
CRD_NAME = "finetunejobs.finetune.dev"
READY_SECONDS = 180
TRAINED_SECONDS = 600
pytestmark = pytest.mark.timeout(TRAINED_SECONDS + READY_SECONDS + 120)


@dataclass(frozen=True)
class Installed:
    """A release that watches one namespace."""

    namespace: str
    jobs: str
    config: helm.Config


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    with (
        fresh_namespace("finetune-system") as namespace,
        fresh_namespace("finetune-jobs") as jobs,
        helm.Config(namespace=namespace) as config,
    ):
        try:
            config.install(CHART, RELEASE, chart_values(jobs), wait="watcher", timeout=READY_SECONDS)
            yield Installed(namespace, jobs, config)
        finally:
            config.uninstall(RELEASE, ignore_not_found=True)


def chart_values(jobs: str) -> Object:
    return merged(merged(chart_images(), {"watch": {"namespaces": [jobs]}, "crds": crds()}), more_values())


def crds() -> Object:
    """Definitions that are there belong to somebody else: bring them up to date, but leave them out of the release."""
    there = CRD_NAME in kubectl("get", "crd", "-o", "name")
    if there:
        for file in (ROOT / "crds").glob("*.yaml"):
            kubectl("apply", "--server-side", "--force-conflicts", "-f", str(file))
    return {"enabled": not there}


@pytest.fixture
def bucket(cluster_s3: ClusterS3, tmp_path: Path) -> str:
    """A bucket with a tiny model and conversations."""
    client, name = cluster_s3.client(), f"e2e-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=name)
    for file in save_tiny_llama(tmp_path / "model").iterdir():
        client.upload_file(str(file), name, f"model/{file.name}")
    rows = "".join(json.dumps(row) + "\n" for row in greetings(64))
    client.put_object(Bucket=name, Key="data.jsonl", Body=rows.encode())
    return name


def job(namespace: str, bucket: str, endpoint: str) -> Object:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "greetings", "namespace": namespace},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": f"s3://{bucket}/model"},
            "dataset": {"uri": f"s3://{bucket}/data.jsonl", "validation": {"fraction": 0.1}},
            "strategy": {"type": "LoRA"},
            "hyperparameters": {"maxSteps": 10, "learningRate": 5e-3, "perDeviceBatchSize": 4, "maxLength": 128},
            "checkpoint": {"everySteps": 5},
            "output": {"uri": f"s3://{bucket}/out"},
            "resources": {"cpu": "500m", "memory": "3Gi", "scratch": "2Gi"},
            "storage": {"s3": {"endpoint": endpoint, "pathStyle": True, "secretName": "bucket-keys"}},
        },
    }


def test_every_replica_is_ready_and_serves_its_metrics(installed: Installed) -> None:
    pods = items("pod", "-n", installed.namespace, "-l", f"app.kubernetes.io/instance={RELEASE}")
    assert pods
    for pod in pods:
        assert {c["type"]: c["status"] for c in pod["status"]["conditions"]}["Ready"] == "True"
        path = f"/api/v1/namespaces/{installed.namespace}/pods/{pod['metadata']['name']}:8080/proxy/metrics"
        assert "finetune_" in kubectl("get", "--raw", path)


def test_the_charts_own_test_reaches_the_operator(installed: Installed) -> None:
    tested = installed.config.test(RELEASE, timeout=READY_SECONDS, logs=True)
    assert [f"{path} 200" in tested["logs"] for path in ("/healthz", "/readyz", "/metrics")] == [True] * 3


def test_a_job_trains_in_restricted_pods_and_delivers_its_adapter(
    installed: Installed, cluster_s3: ClusterS3, bucket: str
) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys", "namespace": installed.jobs}}
    apply({**secret, "stringData": cluster_s3.keys}, job(installed.jobs, bucket, cluster_s3.endpoint))
    with watched_phases(installed.jobs, "greetings") as phases:
        status = finish(installed.jobs, "greetings")["status"]
    assert status["phase"] == "Succeeded", status.get("message")
    assert phases == ["Starting", "Running", "Succeeded"]
    assert status["progress"]["steps"] == "10/10"
    assert status["restarts"]["total"] == 0
    assert float(status["metrics"]["eval_loss"]) < float(status["baseline"]["eval_loss"])
    keys = keys_of(cluster_s3.client(), bucket)
    assert {"out/adapter/adapter_model.safetensors", "out/adapter/adapter_config.json", "out/result.json"} <= keys
    assert status["output"]["uri"] == f"s3://{bucket}/out/adapter"


def test_a_deleted_job_takes_its_children_with_it(installed: Installed) -> None:
    kubectl("-n", installed.jobs, "delete", "ftj", "greetings", "--wait=true")
    kubectl("-n", installed.jobs, "wait", "--for=delete", "job/greetings", "--timeout=60s", seconds=70)
    for kind in ("pod", "job", "service", "configmap"):
        assert not items(kind, "-n", installed.jobs, "-l", "finetune.dev/job=greetings")


def test_uninstalling_leaves_nothing_but_the_definitions(installed: Installed) -> None:
    installed.config.uninstall(RELEASE, wait="watcher", timeout=READY_SECONDS)
    mine = ("-l", f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/managed-by=Helm")
    for kind in ("deployment", "service", "serviceaccount", "role", "rolebinding"):
        for namespace in (installed.namespace, installed.jobs):
            assert not items(kind, "-n", namespace, *mine)
    for kind in ("clusterrole", "clusterrolebinding"):
        assert not [o for o in items(kind) if o["metadata"]["name"].startswith(installed.namespace)]
    assert CRD_NAME in kubectl("get", "crd", "-o", "name")


@contextmanager
def watched_phases(namespace: str, name: str) -> Iterator[list[str]]:
    """What somebody who watches the job has seen when the block ends: each phase once, in order."""
    phases: list[str] = []
    command = [kubectl_program(), "-n", namespace, "get", "ftj", name, "-w", "-o", r'jsonpath={.status.phase}{"\n"}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        yield phases
        watch.terminate()
        lines, _ = watch.communicate()
    phases += [phase for phase, _ in groupby(lines.split())]


def finish(namespace: str, name: str) -> Object:
    """The job when it has ended."""
    arguments = ("-n", namespace, "wait", f"ftj/{name}", "--for=jsonpath={.status.completionTime}")
    kubectl(*arguments, f"--timeout={TRAINED_SECONDS}s", seconds=TRAINED_SECONDS + 30)
    return get("ftj", name, namespace)


def keys_of(client: Any, bucket: str) -> set[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {item["Key"] for page in pages for item in page.get("Contents", ())}
