"""Fixtures of the tests that need a cluster; without one they are skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import of_kind
from tests.e2e.bucket import Bucket, ClusterS3, with_small_inputs
from tests.e2e.cluster import apply, fresh_namespace, install_crd, kubectl
from tests.e2e.operating import Operator
from tests.e2e.training import Installed, release
from tests.support.s3 import Proxy, S3Server, running_s3_server

HERE = Path(__file__).parent
WITHOUT_IMAGES = (
    "test_api_server.py",
    "test_chain_api.py",
    "test_chart_api.py",
    "test_kueue.py",
    "test_operator_api.py",
)
NEEDED = ("KUBECONFIG", "E2E_OPERATOR_IMAGE", "E2E_TRAINER_IMAGE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            # No pods run where only the API server is asked.
            needed = NEEDED[:1] if item.path.name in WITHOUT_IMAGES else NEEDED
            missing = [name for name in needed if not os.environ.get(name)]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs a cluster: set {', '.join(missing)}"))


@pytest.fixture(scope="session")
def cluster_s3() -> Iterator[ClusterS3]:
    endpoint, host = os.environ.get("E2E_S3_ENDPOINT"), os.environ.get("E2E_HOST_ADDRESS")
    if endpoint:
        yield ClusterS3(endpoint, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    elif host:
        with running_s3_server() as server, Proxy(server.endpoint, host) as proxy:
            yield _reached(server, proxy)
    else:
        pytest.fail("set E2E_S3_ENDPOINT or E2E_HOST_ADDRESS: the pods need an S3 service")


def _reached(server: S3Server, proxy: Proxy) -> ClusterS3:
    return ClusterS3(proxy.url, server.access_key, server.secret_key)


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    """A release with a Role in one namespace."""
    with release() as found:
        yield found


@pytest.fixture(scope="module")
def bucket(cluster_s3: ClusterS3, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """A bucket with a tiny model and conversations."""
    return with_small_inputs(cluster_s3, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """One that takes FineTuneJobs."""
    install_crd()
    with fresh_namespace("operator-api") as name:
        yield name


@pytest.fixture
def kubeconfig(namespace: str, tmp_path: Path) -> Path:
    """Credentials of a service account that has the Role of the chart and nothing else."""
    (role,) = [role for role in of_kind("Role", {"watch": {"namespaces": [namespace]}}) if "finetune.dev" in str(role)]
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]}
    apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "operator", "namespace": namespace}},
        role,
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": "operator", "namespace": namespace}, "roleRef": reference, "subjects": [subject],
        },
    )  # fmt: skip
    config = yaml.safe_load(kubectl("config", "view", "--raw", "--flatten", "--minify"))
    token = kubectl("-n", namespace, "create", "token", "operator").strip()
    config["users"] = [{"name": config["contexts"][0]["context"]["user"], "user": {"token": token}}]
    file = tmp_path / "kubeconfig"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture
def operator(namespace: str, kubeconfig: Path) -> Iterator[Operator]:
    running = Operator(namespace, kubeconfig)
    yield running
    if running.process.poll() is None:
        log = running.stop()
        # Whatever permission is missing shows here: User "..." cannot list resource "..." in API group ...
        assert "cannot" not in log or "resource" not in log.split("cannot", 1)[1][:60], log
