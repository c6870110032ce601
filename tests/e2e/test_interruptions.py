"""What happens to jobs that really run: evicted, suspended, upgraded over, deleted; and what bad data does."""

from __future__ import annotations

import json

import pytest

from tests.chart.rendering import CHART, merged
from tests.e2e.bucket import Bucket
from tests.e2e.cluster import get, items, kubectl, status_of
from tests.e2e.training import (
    CHECKPOINT_STEPS,
    READY_SECONDS,
    RELEASE,
    TRAINED_SECONDS,
    Installed,
    assert_same_weights,
    committed,
    finish,
    first_step,
    job,
    long_job,
    pods_of,
    start,
    succeed,
    trains_beyond,
    until,
)

pytestmark = pytest.mark.timeout(2 * TRAINED_SECONDS + READY_SECONDS)


@pytest.fixture(scope="module")
def undisturbed(installed: Installed, bucket: Bucket) -> str:
    """A job that nothing happens to; it trains beside the others."""
    start(bucket, long_job(installed.jobs, "undisturbed", bucket))
    return "undisturbed"


def test_an_evicted_pod_saves_where_it_is_and_its_job_ends_as_if_nothing_had_been(
    installed: Installed, bucket: Bucket, undisturbed: str
) -> None:
    start(bucket, long_job(installed.jobs, "evicted", bucket))
    before = trains_beyond(bucket, installed.jobs, "evicted", CHECKPOINT_STEPS)
    (pod,) = pods_of(installed.jobs, "evicted")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {
        "name": pod["metadata"]["name"], "namespace": installed.jobs,
    }}  # fmt: skip
    path = f"/api/v1/namespaces/{installed.jobs}/pods/{pod['metadata']['name']}/eviction"
    kubectl("create", "--raw", path, "-f", "-", stdin=eviction)
    until(lambda: committed(bucket, "evicted") > before)
    status = succeed(installed.jobs, "evicted")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["disruption"]) == (2, 1, 1)
    (last,) = pods_of(installed.jobs, "evicted")
    assert first_step(installed.jobs, last) > before
    succeed(installed.jobs, undisturbed)
    assert_same_weights(bucket, "evicted", undisturbed)


def test_a_suspended_job_has_no_pods_and_goes_on_where_it_was(
    installed: Installed, bucket: Bucket, undisturbed: str
) -> None:
    start(bucket, long_job(installed.jobs, "suspended", bucket))
    before = trains_beyond(bucket, installed.jobs, "suspended", CHECKPOINT_STEPS)
    suspend(installed, "suspended", True)
    until(lambda: status_of(installed.jobs, "suspended")["phase"] == "Suspended")
    assert [pod for pod in pods_of(installed.jobs, "suspended") if pod["status"]["phase"] == "Running"] == []
    assert get("job", "suspended", installed.jobs)["spec"]["suspend"] is True
    suspend(installed, "suspended", False)
    status = succeed(installed.jobs, "suspended")
    assert (status["attempt"], status["restarts"]["total"]) == (2, 0)
    (last,) = pods_of(installed.jobs, "suspended")
    assert first_step(installed.jobs, last) > before
    succeed(installed.jobs, undisturbed)
    assert_same_weights(bucket, "suspended", undisturbed)


def suspend(installed: Installed, name: str, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    kubectl("-n", installed.jobs, "patch", "ftj", name, "--type=merge", "-p", patch)


def test_an_upgrade_of_the_operator_leaves_running_pods_alone(installed: Installed, bucket: Bucket) -> None:
    start(bucket, long_job(installed.jobs, "upgraded", bucket))
    trains_beyond(bucket, installed.jobs, "upgraded", CHECKPOINT_STEPS)
    (pod,) = pods_of(installed.jobs, "upgraded")
    operators = ("pod", "-n", installed.namespace, "-l", f"app.kubernetes.io/instance={RELEASE}")
    before = {item["metadata"]["uid"] for item in items(*operators)}
    values = merged(installed.values, {"settings": {"logFormat": "json"}})
    installed.config.upgrade(CHART, RELEASE, values, wait="watcher", timeout=READY_SECONDS)
    until(lambda: not before & {item["metadata"]["uid"] for item in items(*operators)})
    status = succeed(installed.jobs, "upgraded")
    assert (status["attempt"], status["restarts"]["total"]) == (1, 0)
    assert [item["metadata"]["uid"] for item in pods_of(installed.jobs, "upgraded")] == [pod["metadata"]["uid"]]


def test_deleting_a_running_job_ends_its_pods_within_their_grace_period(installed: Installed, bucket: Bucket) -> None:
    start(bucket, long_job(installed.jobs, "deleted", bucket))
    trains_beyond(bucket, installed.jobs, "deleted", CHECKPOINT_STEPS)
    kubectl("-n", installed.jobs, "delete", "ftj", "deleted", "--wait=true")
    kinds = ("pod", "job", "service", "configmap", "networkpolicy")

    def gone() -> bool:
        return not any(items(kind, "-n", installed.jobs, "-l", "finetune.dev/job=deleted") for kind in kinds)

    assert until(gone, 70)
    assert "deleted/result.json" not in bucket.keys("deleted/")


def test_bad_data_fails_at_once_with_file_and_line_and_leaves_the_pod_with_its_log(
    installed: Installed, bucket: Bucket
) -> None:
    bucket.put("bad/data.jsonl", b'{"messages": [{"role": "user", "content": "a"}]\n')
    wire = job(installed.jobs, "bad-data", bucket, dataset={"uri": f"{bucket.url}/bad/data.jsonl"})
    start(bucket, wire)
    status = finish(installed.jobs, "bad-data")
    assert (status["phase"], status["reason"], status["restarts"]["total"]) == ("Failed", "Data", 0)
    assert status["message"].startswith(f"{bucket.url}/bad/data.jsonl:1: the JSON is cut off")
    (pod,) = pods_of(installed.jobs, "bad-data")
    assert kubectl("-n", installed.jobs, "logs", pod["metadata"]["name"])
