"""What each network preset adds to a pod, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from finetune_operator.cluster.port import Object
from finetune_operator.plan import plan
from finetune_operator.settings import Settings, SettingsError, load
from tests.operator.world import typed

GPUS = {"nodes": 2, "gpusPerNode": 8}
ADDED = {
    "Sockets": """
env: {NCCL_NET: Socket, NCCL_SOCKET_IFNAME: =eth0, GLOO_SOCKET_IFNAME: eth0}
limits: {}
""",
    "InfiniBand": """
env: {NCCL_NET: IB, NCCL_SOCKET_IFNAME: =eth0, GLOO_SOCKET_IFNAME: eth0}
limits: {rdma/hca_shared_devices_a: "1"}
""",
    "EFA": """
env: {FI_PROVIDER: efa, FI_EFA_USE_HUGE_PAGE: "0", NCCL_SOCKET_IFNAME: =eth0, GLOO_SOCKET_IFNAME: eth0}
limits: {vpc.amazonaws.com/efa: "1"}
""",
}


def pod_spec(network: dict[str, Any] | None, settings: Settings | None = None) -> Object:
    resources = {**GPUS, **({"network": network} if network is not None else {})}
    spec: Object = plan(typed(resources=resources), settings or Settings()).workload["spec"]["template"]["spec"]
    return spec


def without(spec: Object, added: Object) -> Object:
    """The pod's spec without what a preset has added to its only container."""
    (container,) = spec["containers"]
    resources = container["resources"]
    fixed = {kind: {k: v for k, v in resources[kind].items() if k not in added["limits"]} for kind in resources}
    env = [item for item in container["env"] if item["name"] not in added["env"]]
    return {**spec, "containers": [{**container, "resources": fixed, "env": env}]}


@pytest.mark.parametrize("preset", ADDED)
def test_a_preset_adds_its_variables_and_devices_and_nothing_else(preset: str) -> None:
    added, spec = yaml.safe_load(ADDED[preset]), pod_spec({"preset": preset, "interface": "eth0"})
    (container,) = spec["containers"]
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert {name: variables[name] for name in added["env"]} == added["env"]
    for kind in ("requests", "limits"):
        assert added["limits"].items() <= container["resources"][kind].items()
    assert without(spec, added) == pod_spec(None)


@pytest.mark.parametrize("network", [{}, {"preset": "None"}])
def test_without_a_preset_nothing_is_added(network: dict[str, Any]) -> None:
    assert pod_spec(network) == pod_spec(None)


def test_the_device_plugins_own_name_and_number_count() -> None:
    limits = pod_spec({"preset": "InfiniBand", "resource": "rdma/ib", "devices": 8})["containers"][0]["resources"]
    assert limits["limits"]["rdma/ib"] == "8"
    limits = pod_spec({"preset": "EFA", "devices": 32})["containers"][0]["resources"]
    assert limits["requests"]["vpc.amazonaws.com/efa"] == "32"


def test_a_variable_of_the_user_stands_in_for_that_of_a_preset_and_for_no_other() -> None:
    own = [{"name": "NCCL_NET", "value": "IB"}, {"name": "PET_NNODES", "value": "9"}]
    network = {"preset": "Sockets", "interface": "eth0"}
    job = typed(resources={**GPUS, "network": network}, podTemplate={"env": own})
    env = plan(job, Settings()).workload["spec"]["template"]["spec"]["containers"][0]["env"]
    found = [(item["name"], item.get("value")) for item in env]
    asked = ("NCCL_NET", "NCCL_SOCKET_IFNAME", "PET_NNODES")
    # A kubelet takes the last of two that have one name: there is one of each. The nodes come from an annotation.
    assert sorted(item for item in found if item[0] in asked) == [
        ("NCCL_NET", "IB"),
        ("NCCL_SOCKET_IFNAME", "=eth0"),
        ("PET_NNODES", None),
    ]


@pytest.mark.parametrize("preset", ["Sockets", "InfiniBand", "EFA"])
def test_pods_stay_restricted_unless_the_operator_allows_to_lock_memory(preset: str) -> None:
    restricted = pod_spec(None)["containers"][0]["securityContext"]
    assert pod_spec({"preset": preset})["containers"][0]["securityContext"] == restricted
    allowed = pod_spec({"preset": preset}, Settings(infiniband_ipc_lock=True))["containers"][0]["securityContext"]
    if preset == "InfiniBand":
        assert allowed["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert (allowed["runAsUser"], allowed["runAsNonRoot"]) == (0, False)
        assert allowed["allowPrivilegeEscalation"] is False
    else:
        assert allowed == restricted


def test_the_network_of_the_host_is_never_used() -> None:
    for preset in ADDED:
        spec = pod_spec({"preset": preset}, Settings(infiniband_ipc_lock=True))
        assert not spec.get("hostNetwork")
        assert all("hostPath" not in volume for volume in spec["volumes"])


def test_the_operators_setting_is_true_or_false() -> None:
    assert load([], {"FINETUNE_OPERATOR_INFINIBAND_IPC_LOCK": "true"}).infiniband_ipc_lock
    assert not load([], {"FINETUNE_OPERATOR_INFINIBAND_IPC_LOCK": "False"}).infiniband_ipc_lock
    with pytest.raises(SettingsError, match="'yes' is no bool"):
        load(["--infiniband-ipc-lock", "yes"], {})
