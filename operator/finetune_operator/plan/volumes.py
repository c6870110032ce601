"""Volumes of a trainer pod."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from finetune_api.contract import CA_BUNDLE_FILE, JOB_FILE, MODEL_CACHE_DIR, SCRATCH_DIR, VOLUMES_DIR
from finetune_api.job import FineTuneJob
from finetune_api.run import Resources
from finetune_operator.cluster.port import Object
from finetune_operator.plan.names import config_map_name
from finetune_operator.references import places

TMP_DIR = "/tmp"
TMP_SIZE = "1Gi"
SHARED_MEMORY_SHARE = 8
"""sharedMemory `auto` is this part of memory: enough for data workers and NCCL, without starving the process."""
UNITS = {
    "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Mounted:
    """A volume and where the trainer container sees it."""

    volume: Object
    mount: Object


def quantity_bytes(text: str) -> float:
    """Kubernetes' notation of a number (`8Gi`, `1.5G`, `500m`) as a number."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is no quantity such as 8Gi or 500M")
    return float(match[1]) * UNITS[match[2]]


def shared_memory(resources: Resources) -> str:
    """Size of /dev/shm."""
    if resources.shared_memory != "auto":
        return resources.shared_memory
    return f"{max(64, int(quantity_bytes(resources.memory) / SHARED_MEMORY_SHARE / UNITS['Mi']))}Mi"


def volumes(job: FineTuneJob) -> list[Mounted]:
    """The product's own volumes, then claims, then what the job adds."""
    return [*_own(job), *_ca_bundle(job), *_model_cache(job), *_claims(job)]


def _own(job: FineTuneJob) -> Iterator[Mounted]:
    resources, job_file = job.spec.resources, PurePosixPath(JOB_FILE)
    config = {"name": config_map_name(job.metadata.name), "items": [{"key": job_file.name, "path": job_file.name}]}
    yield Mounted(
        {"name": "job", "configMap": config}, {"name": "job", "mountPath": str(job_file.parent), "readOnly": True}
    )
    yield _empty("scratch", SCRATCH_DIR, {"sizeLimit": resources.scratch})
    yield _empty("tmp", TMP_DIR, {"sizeLimit": TMP_SIZE})
    yield _empty("shm", "/dev/shm", {"medium": "Memory", "sizeLimit": shared_memory(resources)})


def _empty(name: str, path: str, source: Object) -> Mounted:
    return Mounted({"name": name, "emptyDir": source}, {"name": name, "mountPath": path})


def _ca_bundle(job: FineTuneJob) -> Iterator[Mounted]:
    name, file = job.spec.storage.s3.ca_bundle_config_map, PurePosixPath(CA_BUNDLE_FILE)
    if name is not None:
        source = {"name": name, "items": [{"key": file.name, "path": file.name}]}
        yield Mounted(
            {"name": "ca-bundle", "configMap": source},
            {"name": "ca-bundle", "mountPath": str(file.parent), "readOnly": True},
        )


def _model_cache(job: FineTuneJob) -> Iterator[Mounted]:
    cache = job.spec.model.cache
    if cache is None:
        return
    source: Object = (
        {"persistentVolumeClaim": {"claimName": cache.pvc}}
        if cache.pvc is not None
        else {"hostPath": {"path": cache.host_path, "type": "DirectoryOrCreate"}}
    )
    yield Mounted({"name": "model-cache", **source}, {"name": "model-cache", "mountPath": MODEL_CACHE_DIR})


def _claims(job: FineTuneJob) -> Iterator[Mounted]:
    written = _claim(job.spec.output.uri)
    claims = sorted({claim for _, uri in places(job.spec) if (claim := _claim(uri))})
    for number, claim in enumerate(claims):
        name, read_only = f"claim-{number}", claim != written
        source: Object = {"claimName": claim, **({"readOnly": True} if read_only else {})}
        mount: Object = {
            "name": name,
            "mountPath": f"{VOLUMES_DIR}/{claim}",
            **({"readOnly": True} if read_only else {}),
        }
        yield Mounted({"name": name, "persistentVolumeClaim": source}, mount)


def _claim(uri: str) -> str | None:
    match = re.match(r"pvc://([^/]+)", uri)
    return match[1] if match else None
