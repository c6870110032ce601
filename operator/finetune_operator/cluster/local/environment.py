"""The environment of a pod's process, from the pod's spec and this machine. Pure.

Addresses: each pod has a loopback address of its own, a function of its Job, attempt and host name; DNS names of the
gang's pods are replaced by it. Paths: what a container sees at a mount path lies in a folder here, so values that
name such a path are moved. Secrets do not exist on this machine: a reference to one is answered from the variable
of the same name, or from the embedded S3 server's keys.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api import contract
from finetune_operator.cluster.kubelet import StartError
from finetune_operator.cluster.port import Object

NOT_INHERITED = re.compile(r"FINETUNE_.*|PET_.*|TORCHELASTIC_.*|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT")
"""Variables of this process that would speak to the trainer of another run than the one it is in."""
KEPT = ("HOME", "USER")
"""What a container must set for lack of a user, this machine has: the SDK's own profiles lie in the home folder."""
POD_DNS_NAME = re.compile(r"([a-z0-9-]+)\.[a-z0-9-]+\.[a-z0-9-]+\.svc(\..+)?")


def address_of(pod: Object, host: str) -> str:
    """The loopback address of the pod with this host name in the gang of `pod`."""
    metadata = pod["metadata"]
    owner = next((item["uid"] for item in metadata.get("ownerReferences", [])), metadata["uid"])
    attempt = metadata.get("annotations", {}).get(contract.ANNOTATION_ATTEMPT, "")
    digest = hashlib.sha256(f"{owner}/{attempt}/{host}".encode()).digest()
    # Not 127.0: that is where everybody else is.
    return f"127.{1 + digest[0] % 254}.{digest[1]}.{1 + digest[2] % 254}"


def environment(
    pod: Object, mounts: Mapping[str, Path], machine: Mapping[str, str], overrides: Mapping[str, str]
) -> dict[str, str]:
    """All variables of the pod's process; raises StartError where a reference cannot be answered.

    Args:
        mounts: mount path -> folder on this machine.
        machine: this process's own variables.
        overrides: what holds whatever the pod says: the embedded S3 server, where it is used.
    """
    base = {name: value for name, value in machine.items() if not NOT_INHERITED.fullmatch(name)}
    known = {**base, **overrides}
    values = {}
    for item in pod["spec"]["containers"][0].get("env", []):
        value = _value(item, pod, known)
        if value is not None:
            values[item["name"]] = _at_home(_resolved(value, pod), mounts)
    kept = {name: base[name] for name in KEPT if name in base}
    return {**base, **values, **kept, **overrides}


def moved(path: str, mounts: Mapping[str, Path]) -> Path | None:
    """Where a path of the container lies on this machine; None outside of all mounts."""
    wanted = PurePosixPath(path)
    fitting = [mount for mount in mounts if wanted.is_relative_to(mount)]
    if not fitting:
        return None
    longest = max(fitting, key=len)
    return mounts[longest] / wanted.relative_to(longest)


def _at_home(value: str, mounts: Mapping[str, Path]) -> str:
    return str(moved(value, mounts) or value) if value.startswith("/") else value


def _resolved(value: str, pod: Object) -> str:
    name = POD_DNS_NAME.fullmatch(value)
    return address_of(pod, name[1]) if name else value


def _value(item: Mapping[str, Any], pod: Object, known: Mapping[str, str]) -> str | None:
    source = item.get("valueFrom")
    if source is None:
        return str(item.get("value", ""))
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    reference = source.get("secretKeyRef")
    if reference is None:
        raise StartError("CreateContainerConfigError", f"{item['name']}: {next(iter(source))} is not known here")
    found = known.get(reference["key"])
    if found is None and not reference.get("optional"):
        raise StartError(
            "CreateContainerConfigError",
            f"the Secret {reference['name']!r} does not exist on this machine; export {reference['key']} instead",
        )
    return found


def field_of(pod: Object, path: str) -> str:
    """The downward API: a field of the pod as text."""
    metadata = pod["metadata"]
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if keyed:
        return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "status.podIP": address_of(pod, pod["spec"].get("hostname", metadata["name"])),
    }
    if path not in fields:
        raise StartError("CreateContainerConfigError", f"the field {path} is not known here")
    return str(fields[path])


def gpus_wanted(pod: Object) -> int:
    """How many devices the container asks for, by whatever extended resource."""
    limits: Mapping[str, Any] = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return sum(int(count) for name, count in limits.items() if "/" in name)


def visible(devices: Iterable[str]) -> dict[str, str]:
    """The variable that shows CUDA these devices and no others."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
