"""Nodes that exist in the API alone: no kubelet runs their pods, and only the test says that they live."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from kubernetes import client, config

from tests.e2e.cluster import Object, kubectl

LEASES = "kube-node-lease"
TAINT = "finetune.dev/paper"
BEAT_SECONDS = 5.0
"""Half of what a kubelet takes, of the 40 or 50 seconds after which its node counts as lost."""
ROOM = {"cpu": "16", "memory": "3Gi", "pods": "20", "ephemeral-storage": "500Gi"}
"""Memory for one pod of the tests' jobs, and for what a cluster runs on every node."""


class PaperNode:
    """A ready node; its taint lets only those pods come that tolerate it by this node's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._silent = threading.Event()
        self._heart = threading.Thread(target=self._beat)

    @property
    def toleration(self) -> Object:
        return {"key": TAINT, "operator": "Equal", "value": self.name, "effect": "NoSchedule"}

    @property
    def preference(self) -> Object:
        """A node affinity that brings a pod here as long as that is possible."""
        here = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [self.name]}]}
        return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": here}]}

    def create(self) -> None:
        kubectl("create", "-f", "-", stdin={
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name, "labels": {"kubernetes.io/hostname": self.name}},
            "spec": {"taints": [{"key": TAINT, "value": self.name, "effect": "NoSchedule"}]},
        })  # fmt: skip
        kubectl("create", "-f", "-", stdin={
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": self.name, "namespace": LEASES},
            "spec": {"holderIdentity": self.name, "leaseDurationSeconds": 40, "renewTime": _now()},
        })  # fmt: skip
        ready = {"type": "Ready", "status": "True", "reason": "Paper", "message": "", "lastHeartbeatTime": _now()}
        status = {"conditions": [ready], "capacity": ROOM, "allocatable": ROOM}
        config.load_kube_config()
        client.CoreV1Api().patch_node_status(self.name, {"status": status})
        self._heart.start()

    def fall_silent(self) -> None:
        """No sign of life from now on."""
        self._silent.set()
        self._heart.join()

    def delete(self) -> None:
        """As when the machine of a cloud is given back."""
        self.fall_silent()
        for arguments in (("node", self.name), ("-n", LEASES, "lease", self.name)):
            kubectl("delete", *arguments, "--ignore-not-found")

    def _beat(self) -> None:
        leases = client.CoordinationV1Api()
        while not self._silent.wait(BEAT_SECONDS):
            leases.patch_namespaced_lease(self.name, LEASES, {"spec": {"renewTime": _now()}})


@contextmanager
def paper_node() -> Iterator[PaperNode]:
    """A new one, deleted afterwards."""
    node = PaperNode(f"paper-{secrets.token_hex(3)}")
    try:
        node.create()
        yield node
    finally:
        node.delete()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
