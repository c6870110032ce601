"""Pods that train one model, sharded over them, lose one of them and end with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.e2e.cluster import Object, apply, get, items, kubectl
from tests.e2e.conftest import ClusterS3
from tests.e2e.test_install import (
    READY_SECONDS,
    TRAINED_SECONDS,
    Installed,
    bucket,
    finish,
    installed,
    job,
    watched_phases,
)

__all__ = ["bucket", "installed"]
STEPS, EVERY, LOST_AT = 800, 40, 80
pytestmark = pytest.mark.timeout(2 * TRAINED_SECONDS + READY_SECONDS + 120)


def gang(namespace: str, bucket: str, endpoint: str, nodes: int, name: str) -> Object:
    """Full fine-tuning by FSDP over so many pods of one process."""
    wire = job(namespace, bucket, endpoint)
    wire["metadata"]["name"] = name
    wire["spec"] |= {
        "strategy": {"type": "Full"},
        "distributed": {"sharding": "FSDP"},
        "output": {"uri": f"s3://{bucket}/{name}"},
        "checkpoint": {"everySteps": EVERY},
    }
    wire["spec"]["hyperparameters"] |= {"epochs": 120, "maxSteps": STEPS, "perDeviceBatchSize": 2}
    wire["spec"]["resources"] = {"nodes": nodes, "cpu": "200m", "memory": "2Gi", "scratch": "1Gi"}
    return wire


def lose(namespace: str, name: str, index: int) -> None:
    """Kill the pod with this index without notice, in the middle of the training."""
    until = time.monotonic() + TRAINED_SECONDS
    while (step := reached(namespace, name)) < LOST_AT:
        assert time.monotonic() < until, f"{name} came to step {step} only"
    labels = f"finetune.dev/job={name},batch.kubernetes.io/job-completion-index={index}"
    kubectl("-n", namespace, "delete", "pod", "-l", labels, "--grace-period=0", "--force")
    assert reached(namespace, name) < STEPS


def reached(namespace: str, name: str) -> int:
    status = get("ftj", name, namespace).get("status", {})
    assert status.get("phase") not in ("Failed", "Succeeded"), status.get("message")
    return int(status.get("progress", {}).get("step") or 0)


def weights(client: Any, bucket: str, name: str) -> dict[str, torch.Tensor]:
    return load(client.get_object(Bucket=bucket, Key=f"{name}/model/model.safetensors")["Body"].read())


@pytest.mark.parametrize(("nodes", "index"), [(2, 1), (4, 0)])
def test_a_gang_that_loses_a_pod_ends_with_the_weights_of_one_that_does_not(
    installed: Installed, cluster_s3: ClusterS3, bucket: str, nodes: int, index: int
) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys", "namespace": installed.jobs}}
    whole, broken = f"whole-{nodes}", f"broken-{nodes}"
    apply({**secret, "stringData": cluster_s3.keys}, gang(installed.jobs, bucket, cluster_s3.endpoint, nodes, whole))
    assert finish(installed.jobs, whole)["status"]["restarts"]["total"] == 0
    apply(gang(installed.jobs, bucket, cluster_s3.endpoint, nodes, broken))
    with watched_phases(installed.jobs, broken) as phases:
        lose(installed.jobs, broken, index)
        status = finish(installed.jobs, broken)["status"]
    assert status["phase"] == "Succeeded", status.get("message")
    assert "Restarting" in phases
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["disruption"]) == (2, 1, 1)
    found, expected = (weights(cluster_s3.client(), bucket, name) for name in (broken, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads(cluster_s3.client().get_object(Bucket=bucket, Key=f"{broken}/result.json")["Body"].read())


def test_an_elastic_job_goes_on_with_the_pods_that_have_room(
    installed: Installed, cluster_s3: ClusterS3, bucket: str
) -> None:
    """A pod more than there are nodes, and no two of them on one."""
    nodes = len(items("node"))
    wire = gang(installed.jobs, bucket, cluster_s3.endpoint, nodes + 1, "elastic")
    wire["spec"]["distributed"] |= {"minNodes": 1, "minNodesAfterSeconds": 20}
    wire["spec"]["hyperparameters"] |= {"maxSteps": EVERY, "perDeviceBatchSize": 2}
    apart = {"labelSelector": {"matchLabels": {"finetune.dev/job": "elastic"}}, "topologyKey": "kubernetes.io/hostname"}
    wire["spec"]["scheduling"] = {
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    }
    wire["spec"]["runPolicy"] = {"preflight": "Never"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys", "namespace": installed.jobs}}
    apply({**secret, "stringData": cluster_s3.keys}, wire)
    status = finish(installed.jobs, "elastic")["status"]
    assert status["phase"] == "Succeeded", status.get("message")
    assert (status["attempt"], status["restarts"]["total"]) == (2, 0)
    assert 1 <= status["nodes"] <= nodes
    result = json.loads(cluster_s3.client().get_object(Bucket=bucket, Key="elastic/result.json")["Body"].read())
    assert (result["worldSize"], result["globalBatchSize"]) == (status["nodes"], 2 * (nodes + 1))


def test_pods_stay_in_one_domain_and_run_as_whom_the_job_says_after_what_it_says(
    installed: Installed, cluster_s3: ClusterS3, bucket: str
) -> None:
    wire = gang(installed.jobs, bucket, cluster_s3.endpoint, 2, "together")
    wire["spec"]["hyperparameters"]["maxSteps"] = 2
    wire["spec"]["scheduling"] = {"topologyKey": "kubernetes.io/hostname"}
    check = "import os; assert (os.getuid(), os.getgroups()) == (1000, [2000, 3000]), (os.getuid(), os.getgroups())"
    mounted = [{"name": "shared", "mountPath": "/shared"}]
    first = {
        "name": "check",
        "image": os.environ["E2E_TRAINER_IMAGE"],
        "command": ["python", "-c", f"{check}; open('/shared/a', 'w')"],
    }
    wire["spec"]["podTemplate"] = {
        "securityContext": {"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 2000, "supplementalGroups": [3000]},
        "volumes": [{"name": "shared", "emptyDir": {"sizeLimit": "1Mi"}}],
        "volumeMounts": mounted,
        "initContainers": [{**first, "volumeMounts": mounted}],
    }
    wire["spec"]["runPolicy"] = {"preflight": "Never"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys", "namespace": installed.jobs}}
    apply({**secret, "stringData": cluster_s3.keys}, wire)
    status = finish(installed.jobs, "together")["status"]
    assert status["phase"] == "Succeeded", status.get("message")
    pods = items("pod", "-n", installed.jobs, "-l", "finetune.dev/job=together")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 1
    assert len(pods) == 2
