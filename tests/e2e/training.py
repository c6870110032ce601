"""Releases of the chart whose operators run as pods, and small jobs that really train in pods under them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import helm_python as helm
import torch

from tests.chart.rendering import CHART, ROOT, merged
from tests.e2e.bucket import Bucket
from tests.e2e.cluster import (
    Object,
    apply,
    chart_images,
    fresh_namespace,
    items,
    kubectl,
    kubectl_program,
    more_values,
    status_of,
)

RELEASE = "finetune"
CRD_NAME = "finetunejobs.finetune.dev"
READY_SECONDS = 180
TRAINED_SECONDS = 600
ONE_THREAD = {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}
"""A pod takes all processors that it sees; where several small ones share two, their threads wait for each other."""
LONG_STEPS, CHECKPOINT_STEPS = 1500, 100
CHECKPOINT = re.compile(r".*/checkpoints/step-(\d+)/manifest\.json")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Installed:
    """A release, and a namespace for jobs that it watches."""

    namespace: str
    jobs: str
    config: helm.Config
    values: Object

    def refusals(self) -> list[str]:
        """What the API server has not let the operator do, by the logs of all replicas that are there."""
        log = kubectl("-n", self.namespace, "logs", "-l", f"app.kubernetes.io/instance={RELEASE}", "--tail=-1")
        # User "..." cannot list resource "..." in API group ...
        return [line for line in log.splitlines() if re.search(r"cannot \w+ resource", line)]


@contextmanager
def release(everywhere: bool = False) -> Iterator[Installed]:
    """Install the chart, and leave nothing afterwards but the definitions.

    Args:
        everywhere: watch all namespaces, with a ClusterRole; otherwise the one for jobs alone, with a Role in it.
    """
    with (
        fresh_namespace("finetune-system") as namespace,
        fresh_namespace("finetune-jobs") as jobs,
        helm.Config(namespace=namespace) as config,
    ):
        values = chart_values([] if everywhere else [jobs])
        installed = Installed(namespace, jobs, config, values)
        try:
            config.install(CHART, RELEASE, values, wait="watcher", timeout=READY_SECONDS)
            with _jobs_deleted(jobs):
                yield installed
            # Of a release that a test has removed the pods that still end have lost their rights already.
            refusals = installed.refusals() if items("deployment", "-n", namespace) else []
            assert not refusals, refusals
        finally:
            config.uninstall(RELEASE, ignore_not_found=True)


@contextmanager
def _jobs_deleted(namespace: str) -> Iterator[None]:
    """Afterwards, while an operator sees to it: a namespace with a Job that runs could not be deleted."""
    try:
        yield
    finally:
        kubectl("-n", namespace, "delete", "ftj", "--all", "--wait=true", seconds=120)


def chart_values(namespaces: Sequence[str]) -> Object:
    return merged(merged(chart_images(), {"watch": {"namespaces": [*namespaces]}, "crds": crds()}), more_values())


def crds() -> Object:
    """Definitions that are there belong to somebody else: bring them up to date, but leave them out of the release."""
    there = CRD_NAME in kubectl("get", "crd", "-o", "name")
    if there:
        for file in (ROOT / "crds").glob("*.yaml"):
            kubectl("apply", "--server-side", "--force-conflicts", "-f", str(file))
    return {"enabled": not there}


def job(namespace: str, name: str, bucket: Bucket, **spec: Object) -> Object:
    """LoRA on the inputs of `with_small_inputs`, ten steps; `spec` replaces parts, but adds to hyperparameters."""
    hyperparameters = {"maxSteps": 10, "learningRate": 5e-3, "perDeviceBatchSize": 4, "maxLength": 128}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": f"{bucket.url}/model"},
            "dataset": {"uri": f"{bucket.url}/data.jsonl", "validation": {"fraction": 0.1}},
            "strategy": {"type": "LoRA"},
            "checkpoint": {"everySteps": 5},
            "output": {"uri": f"{bucket.url}/{name}"},
            "resources": {"cpu": "200m", "memory": "2Gi", "scratch": "1Gi"},
            "storage": bucket.s3.storage(),
            "podTemplate": ONE_THREAD,
            **spec,
            "hyperparameters": hyperparameters | spec.get("hyperparameters", {}),
        },
    }


def gang(namespace: str, name: str, bucket: Bucket, nodes: int) -> Object:
    """Full fine-tuning by FSDP over so many pods of one process."""
    wire = job(namespace, name, bucket, strategy={"type": "Full"}, distributed={"sharding": "FSDP"})
    wire["spec"]["resources"]["nodes"] = nodes
    wire["spec"]["hyperparameters"]["perDeviceBatchSize"] = 2
    return wire


def long_job(namespace: str, name: str, bucket: Bucket, grace_seconds: int = 60) -> Object:
    """One that trains for so long that something can happen to it in the middle."""
    wire = job(namespace, name, bucket, hyperparameters={"epochs": 1000, "maxSteps": LONG_STEPS})
    wire["spec"]["checkpoint"] = {"everySteps": CHECKPOINT_STEPS}
    wire["spec"]["runPolicy"] = {"terminationGracePeriodSeconds": grace_seconds}
    return wire


def start(bucket: Bucket, *jobs: Object) -> None:
    """Apply jobs, and the Secret that they need."""
    apply(bucket.s3.secret(jobs[0]["metadata"]["namespace"]), *jobs)


def finish(namespace: str, name: str) -> Object:
    """The status of a job when it has ended; raises AssertionError when the job is deleted."""
    wait = ("-n", namespace, "wait", f"ftj/{name}", "--for=jsonpath={.status.completionTime}", "--timeout=20s")

    def ended() -> Object | None:
        # Now and then it looks by itself: the command does not notice that the job is gone.
        kubectl(*wait, may_fail=True)
        status = status_of(namespace, name)
        return status if "completionTime" in status else None

    return until(ended)


def succeed(namespace: str, name: str) -> Object:
    """The same, of a job that must not fail."""
    status = finish(namespace, name)
    assert status["phase"] == "Succeeded", f"{name}: {status.get('message')}"
    return status


def trains_beyond(bucket: Bucket, namespace: str, name: str, step: int) -> int:
    """The step of the newest checkpoint, when there is one of this step or a later one and the job trains on."""

    def newest() -> int | None:
        status = status_of(namespace, name)
        assert status.get("phase") not in ("Failed", "Succeeded"), f"{name} has ended: {status.get('message')}"
        found = committed(bucket, name)
        return found if found >= step and status["phase"] == "Running" else None

    return until(newest)


def committed(bucket: Bucket, name: str) -> int:
    """The step of the newest checkpoint that is complete; 0 without any."""
    found = (CHECKPOINT.fullmatch(key) for key in bucket.keys(f"{name}/checkpoints/"))
    return max((int(match[1]) for match in found if match), default=0)


def first_step(namespace: str, pod: Object) -> int:
    """The first step of which a pod's log tells."""
    log = kubectl("-n", namespace, "logs", pod["metadata"]["name"])
    found = re.search(r" step (\d+)/", log)
    assert found, log
    return int(found[1])


def assert_same_weights(bucket: Bucket, name: str, other: str) -> None:
    """That two jobs have delivered the same adapter, bit by bit."""
    found, expected = (bucket.weights(f"{job}/adapter/adapter_model.safetensors") for job in (name, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def pods_of(namespace: str, name: str) -> list[Object]:
    """All of a job that are there, lowest index first."""
    found = items("pod", "-n", namespace, "-l", f"finetune.dev/job={name},finetune.dev/component=trainer")
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


def until(answer: Callable[[], Answer | None], seconds: float = TRAINED_SECONDS) -> Answer:
    """The first answer that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := answer():
            return found
        time.sleep(0.5)
    raise AssertionError(f"it did not come true within {seconds} s")


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
