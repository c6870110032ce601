"""From `helm install` to a tuned adapter in the bucket and back to nothing, under restricted pod security.

The operator watches one namespace alone here, so it runs with the chart's namespaced Role: whatever permission it
lacks, these tests notice. They are the steps of one story, in this order.
"""

from __future__ import annotations

import pytest

from tests.e2e.bucket import Bucket
from tests.e2e.cluster import items, kubectl
from tests.e2e.training import (
    CRD_NAME,
    READY_SECONDS,
    RELEASE,
    TRAINED_SECONDS,
    Installed,
    finish,
    job,
    start,
    until,
    watched_phases,
)

pytestmark = pytest.mark.timeout(TRAINED_SECONDS + READY_SECONDS + 120)


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


@pytest.mark.parametrize(("role", "may_write"), [("view", "no"), ("edit", "yes"), ("admin", "yes")])
def test_people_may_do_with_jobs_what_their_role_in_the_namespace_says(
    installed: Installed, role: str, may_write: str
) -> None:
    user = f"somebody-with-{role}"
    kubectl("-n", installed.jobs, "create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}")

    def may(verb: str, *more: str) -> str:
        question = ("auth", "can-i", verb, "finetunejobs.finetune.dev", f"--as={user}", *more)
        return kubectl("-n", installed.jobs, *question, may_fail=True).strip()

    # The cluster adds up roles in its own time.
    until(lambda: may("get") == "yes", 60)
    assert [may(verb) for verb in ("list", "watch")] == ["yes", "yes"]
    assert [may(verb) for verb in ("create", "patch", "delete")] == [may_write] * 3
    assert may("patch", "--subresource=status") == "no"


def test_a_job_trains_in_restricted_pods_and_delivers_its_adapter(installed: Installed, bucket: Bucket) -> None:
    start(bucket, job(installed.jobs, "greetings", bucket))
    with watched_phases(installed.jobs, "greetings") as phases:
        status = finish(installed.jobs, "greetings")
    assert status["phase"] == "Succeeded", status.get("message")
    assert phases == ["Starting", "Running", "Succeeded"]
    assert status["progress"]["steps"] == "10/10"
    assert status["restarts"]["total"] == 0
    assert float(status["metrics"]["eval_loss"]) < float(status["baseline"]["eval_loss"])
    files = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "result.json"}
    assert {f"greetings/{file}" for file in files} <= bucket.keys()
    assert status["output"]["uri"] == f"{bucket.url}/greetings/adapter"


def test_a_deleted_job_takes_its_children_with_it(installed: Installed) -> None:
    kubectl("-n", installed.jobs, "delete", "ftj", "greetings", "--wait=true")
    kubectl("-n", installed.jobs, "wait", "--for=delete", "job/greetings", "--timeout=60s", seconds=70)
    for kind in ("pod", "job", "service", "configmap"):
        assert not items(kind, "-n", installed.jobs, "-l", "finetune.dev/job=greetings")


def test_uninstalling_leaves_nothing_but_the_definitions(installed: Installed) -> None:
    assert installed.refusals() == []
    installed.config.uninstall(RELEASE, wait="watcher", timeout=READY_SECONDS)
    mine = ("-l", f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/managed-by=Helm")
    for kind in ("deployment", "service", "serviceaccount", "role", "rolebinding"):
        for namespace in (installed.namespace, installed.jobs):
            assert not items(kind, "-n", namespace, *mine)
    for kind in ("clusterrole", "clusterrolebinding"):
        assert not [o for o in items(kind) if o["metadata"]["name"].startswith(installed.namespace)]
    assert CRD_NAME in kubectl("get", "crd", "-o", "name")
