"""The chart on a real API server: install, election, upgrade from an earlier chart with live jobs, uninstall.

No image is pulled: the replicas are processes of this machine, under the service account, the Roles and the settings
that the release has made, and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import helm_python as helm
import pytest
import yaml

from finetune_operator.cluster.kubernetes import connect, load_configuration
from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, NETWORK_POLICY, Key, Object
from tests.chart.rendering import CHART
from tests.e2e.cluster import fresh_namespace, get, install_crd, items, kubectl
from tests.e2e.operating import ROOT, eventually, reaches, tune

RELEASE = "finetune"
KINDS = "deployment,service,serviceaccount,role,rolebinding,poddisruptionbudget"
MINE = ("-l", f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/managed-by=Helm")


class Release:
    """A release that watches one namespace, and replicas of its operator as processes."""

    def __init__(self, namespace: str, jobs: str, config: helm.Config, folder: Path) -> None:
        self.namespace = namespace
        self.jobs = jobs
        self.config = config
        # CRDs belong to whoever has put them there: see install_crd.
        self.values: Object = {"watch": {"namespaces": [jobs]}, "crds": {"enabled": False}}
        self._folder = folder
        self.replicas: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []

    def start(self) -> subprocess.Popen[bytes]:
        """One more replica, as the Deployment says."""
        (deployment,) = items("deployment", "-n", self.namespace, *MINE)
        pod = deployment["spec"]["template"]["spec"]
        environment = {item["name"]: item.get("value", "") for item in pod["containers"][0]["env"]}
        path = os.pathsep.join(str(ROOT / folder) for folder in ("crds", "operator"))
        config = yaml.safe_load(kubectl("config", "view", "--raw", "--flatten", "--minify"))
        token = kubectl("-n", self.namespace, "create", "token", pod["serviceAccountName"]).strip()
        config["users"] = [{"name": config["contexts"][0]["context"]["user"], "user": {"token": token}}]
        file = self._folder / f"{secrets.token_hex(3)}.kubeconfig"
        file.write_text(json.dumps(config))
        self.ports.append(_free_port())
        more = {"KUBECONFIG": str(file), "PYTHONPATH": path, "FINETUNE_OPERATOR_HTTP_PORT": str(self.ports[-1])}
        log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-m", "finetune_operator.main"]
        self.replicas.append(subprocess.Popen(command, env={**os.environ, **environment, **more}, stderr=log))
        return self.replicas[-1]

    def ready(self) -> bool:
        """Whether the newest replica is: it has looked at the Lease by then, and counts from its first look."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[-1]}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def lease(self) -> Object:
        spec: Object = get("lease", f"{RELEASE}-finetune-operator", self.namespace)["spec"]
        return spec

    def stop(self) -> None:
        for replica in self.replicas:
            if replica.poll() is None:
                replica.kill()
                replica.wait()
        self.replicas.clear()


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    install_crd()
    with (
        fresh_namespace("finetune-system") as namespace,
        fresh_namespace("finetune-jobs") as jobs,
        helm.Config(namespace=namespace) as config,
    ):
        found = Release(namespace, jobs, config, tmp_path)
        try:
            yield found
        finally:
            found.stop()
            kubectl("-n", jobs, "delete", "ftj", "--all", "--wait=false")
            config.uninstall(RELEASE, ignore_not_found=True)


def earlier_chart(folder: Path) -> Path:
    """As an earlier release may have been: one replica, without budget, monitoring and tests."""
    chart = folder / "finetune-operator"
    shutil.copytree(CHART, chart)
    for name in ("pdb.yaml", "monitoring.yaml", "tests.yaml"):
        (chart / "templates" / name).unlink()
    for name, old, new in (
        ("Chart.yaml", "version: 0.1.0", "version: 0.0.9"),
        ("values.yaml", "replicas: 2", "replicas: 1"),
    ):
        text = (chart / name).read_text()
        assert old in text
        (chart / name).write_text(text.replace(old, new, 1))
    return chart


async def test_live_jobs_go_through_upgrade_and_uninstall_untouched(release: Release, tmp_path: Path) -> None:
    release.config.install(earlier_chart(tmp_path), RELEASE, release.values)
    release.start()
    kubectl("apply", "-f", "-", stdin=tune(release.jobs, "live"))
    before = await reaches(release.jobs, "live", "Starting")
    job = get("job", "live", release.jobs)
    release.stop()

    release.config.upgrade(CHART, RELEASE, release.values)
    (deployment,) = items("deployment", "-n", release.namespace, *MINE)
    assert deployment["spec"]["replicas"] == 2
    release.start()
    kubectl("apply", "-f", "-", stdin=tune(release.jobs, "new"))
    await reaches(release.jobs, "new", "Starting")
    after = get("job", "live", release.jobs)
    assert (after["metadata"]["uid"], after["spec"]) == (job["metadata"]["uid"], job["spec"])
    status = get("ftj", "live", release.jobs)["status"]
    for field in ("phase", "attempt", "restarts", "startTime", "workload"):
        assert status[field] == before[field]

    release.stop()
    release.config.uninstall(RELEASE)
    for namespace in (release.namespace, release.jobs):
        assert not items(KINDS, "-n", namespace, *MINE)
    assert get("job", "live", release.jobs)["metadata"]["uid"] == job["metadata"]["uid"]
    assert {item["metadata"]["name"] for item in items("ftj", "-n", release.jobs)} == {"live", "new"}


async def test_a_killed_leader_is_succeeded_within_twenty_seconds_and_a_stopped_one_at_once(release: Release) -> None:
    release.config.install(CHART, RELEASE, release.values)
    first = release.start()
    held = await eventually(lambda: _holder(release))
    release.start()
    await eventually(release.ready)
    kubectl("apply", "-f", "-", stdin=tune(release.jobs, "before"))
    await reaches(release.jobs, "before", "Starting")
    first.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first.wait()
    kubectl("apply", "-f", "-", stdin=tune(release.jobs, "after"))
    await reaches(release.jobs, "after", "Starting")
    assert time.monotonic() - killed < 20
    assert release.lease()["holderIdentity"] not in ("", held)
    assert release.lease()["leaseTransitions"] == 1
    second = release.replicas[-1]
    second.terminate()
    assert second.wait(30) == 0
    assert release.lease()["holderIdentity"] == ""


async def test_what_the_operator_lists_is_whole_and_never_null(release: Release) -> None:
    async with connect(await load_configuration(), namespaces=(release.jobs,)) as cluster:
        for kind in (FINE_TUNE_JOB, JOB, NETWORK_POLICY):
            for metadata_only in (False, True):
                assert [obj async for obj in cluster.walk(kind, metadata_only=metadata_only)] == []
        created = await cluster.create(tune(release.jobs, "one"))
        (found,) = [obj async for obj in cluster.walk(FINE_TUNE_JOB, metadata_only=True)]
        assert found["metadata"]["uid"] == created["metadata"]["uid"]
        assert "spec" not in found
        await cluster.delete(FINE_TUNE_JOB, Key(release.jobs, "one"), created["metadata"]["uid"])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _holder(release: Release) -> str:
    leases = items("lease", "-n", release.namespace)
    return str(leases[0]["spec"]["holderIdentity"]) if leases else ""
