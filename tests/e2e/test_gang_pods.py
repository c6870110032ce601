"""Pods that train one model, sharded over them, lose one of them and end with the weights of an undisturbed run."""

from __future__ import annotations

import os

import pytest
import torch

from tests.e2e.bucket import Bucket
from tests.e2e.cluster import Object, items, kubectl
from tests.e2e.training import (
    ONE_THREAD,
    READY_SECONDS,
    TRAINED_SECONDS,
    Installed,
    gang,
    pods_of,
    start,
    succeed,
    trains_beyond,
    watched_phases,
)

STEPS, EVERY, LOST_AT = 800, 40, 80
pytestmark = pytest.mark.timeout(2 * TRAINED_SECONDS + READY_SECONDS + 120)


def long_gang(installed: Installed, bucket: Bucket, nodes: int, name: str) -> Object:
    """One that trains for so long that a pod can be taken away in the middle."""
    wire = gang(installed.jobs, name, bucket, nodes)
    wire["spec"]["hyperparameters"] |= {"epochs": 120, "maxSteps": STEPS}
    wire["spec"]["checkpoint"] = {"everySteps": EVERY}
    return wire


def lose(installed: Installed, bucket: Bucket, name: str, index: int) -> None:
    """Kill the pod with this index without notice, in the middle of the training."""
    assert trains_beyond(bucket, installed.jobs, name, LOST_AT) < STEPS
    labels = f"finetune.dev/job={name},batch.kubernetes.io/job-completion-index={index}"
    kubectl("-n", installed.jobs, "delete", "pod", "-l", labels, "--grace-period=0", "--force")


@pytest.mark.parametrize(("nodes", "index"), [(2, 1), (4, 0)])
def test_a_gang_that_loses_a_pod_ends_with_the_weights_of_one_that_does_not(
    installed: Installed, bucket: Bucket, nodes: int, index: int
) -> None:
    whole, broken = f"whole-{nodes}", f"broken-{nodes}"
    start(bucket, long_gang(installed, bucket, nodes, whole))
    assert succeed(installed.jobs, whole)["restarts"]["total"] == 0
    start(bucket, long_gang(installed, bucket, nodes, broken))
    with watched_phases(installed.jobs, broken) as phases:
        lose(installed, bucket, broken, index)
        status = succeed(installed.jobs, broken)
    assert "Restarting" in phases
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["disruption"]) == (2, 1, 1)
    found, expected = (bucket.weights(f"{name}/model/model.safetensors") for name in (broken, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bucket.json(f"{broken}/result.json")["steps"] == STEPS


def test_an_elastic_job_goes_on_with_the_pods_that_have_room(installed: Installed, bucket: Bucket) -> None:
    """A pod more than there are nodes, and no two of them on one."""
    nodes = len(items("node"))
    wire = gang(installed.jobs, "elastic", bucket, nodes + 1)
    wire["spec"]["distributed"] |= {"minNodes": 1, "minNodesAfterSeconds": 20}
    wire["spec"]["hyperparameters"]["maxSteps"] = EVERY
    apart = {"labelSelector": {"matchLabels": {"finetune.dev/job": "elastic"}}, "topologyKey": "kubernetes.io/hostname"}
    wire["spec"]["scheduling"] = {
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    }
    wire["spec"]["runPolicy"] = {"preflight": "Never"}
    start(bucket, wire)
    status = succeed(installed.jobs, "elastic")
    assert (status["attempt"], status["restarts"]["total"]) == (2, 0)
    assert 1 <= status["nodes"] <= nodes
    result = bucket.json("elastic/result.json")
    assert (result["worldSize"], result["globalBatchSize"]) == (status["nodes"], 2 * (nodes + 1))


def test_pods_stay_in_one_domain_and_run_as_whom_the_job_says_after_what_it_says(
    installed: Installed, bucket: Bucket
) -> None:
    wire = gang(installed.jobs, "together", bucket, 2)
    wire["spec"]["hyperparameters"]["maxSteps"] = 2
    wire["spec"]["scheduling"] = {"topologyKey": "kubernetes.io/hostname"}
    check = "import os; assert (os.getuid(), os.getgroups()) == (1000, [2000, 3000]), (os.getuid(), os.getgroups())"
    mounted = [{"name": "shared", "mountPath": "/shared"}]
    first = {
        "name": "check",
        "image": os.environ["E2E_TRAINER_IMAGE"],
        "command": ["python", "-c", f"{check}; open('/shared/a', 'w')"],
    }
    wire["spec"]["podTemplate"] = ONE_THREAD | {
        "securityContext": {"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 2000, "supplementalGroups": [3000]},
        "volumes": [{"name": "shared", "emptyDir": {"sizeLimit": "1Mi"}}],
        "volumeMounts": mounted,
        "initContainers": [{**first, "volumeMounts": mounted}],
    }
    wire["spec"]["runPolicy"] = {"preflight": "Never"}
    start(bucket, wire)
    succeed(installed.jobs, "together")
    pods = pods_of(installed.jobs, "together")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 1
    assert len(pods) == 2
