"""Environment of the trainer container."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api import contract
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.port import Object
from finetune_operator.plan.fabric import network_environment
from finetune_operator.plan.names import master_address
from finetune_operator.settings import Settings

COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
CACHE_DIR = f"{contract.SCRATCH_DIR}/.cache"
PRIVATE = {
    # Nothing is told to anybody, by the names that the libraries read.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    # The root file system is read-only and the user has no entry in /etc/passwd: caches and names go elsewhere.
    "HOME": "/tmp",
    "USER": "trainer",
    "XDG_CACHE_HOME": CACHE_DIR,
    "HF_HOME": f"{CACHE_DIR}/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": f"{CACHE_DIR}/inductor",
    "TRITON_CACHE_DIR": f"{CACHE_DIR}/triton",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(job: FineTuneJob, settings: Settings) -> list[Object]:
    """The contract's variables; the job's own additions cannot replace them, but those of a network's preset."""
    own = [*_contract(job), *_rendezvous(job, settings), *_s3(job), *_model(job), *_libraries()]
    taken = {item["name"] for item in own}
    added = [item.to_wire() for item in job.spec.additions.env if item.name not in taken]
    chosen = {item["name"] for item in added}
    return [*added, *(item for item in _network(job) if item["name"] not in chosen), *own]


def _contract(job: FineTuneJob) -> Iterator[Object]:
    grace = job.spec.run_policy.termination_grace_period_seconds
    yield _field(contract.ENV_ATTEMPT, f"metadata.annotations['{contract.ANNOTATION_ATTEMPT}']")
    yield _field(contract.ENV_POD_NAME, "metadata.name")
    yield _field(contract.ENV_POD_IP, "status.podIP")
    yield _value(contract.ENV_GRACE_PERIOD, str(grace))


def _rendezvous(job: FineTuneJob, settings: Settings) -> Iterator[Object]:
    resources = job.spec.resources
    yield _field(contract.ENV_NNODES, f"metadata.annotations['{contract.ANNOTATION_NODES}']")
    yield _value(contract.ENV_NPROC_PER_NODE, str(resources.processes_per_node))
    yield _field(contract.ENV_NODE_RANK, COMPLETION_INDEX)
    if resources.nodes > 1:
        # One that is alone needs no name: it meets itself under its own address.
        yield _value(contract.ENV_MASTER_ADDR, master_address(job, settings.cluster_domain))
    yield _value(contract.ENV_MASTER_PORT, str(contract.RENDEZVOUS_PORT))


def _s3(job: FineTuneJob) -> Iterator[Object]:
    s3 = job.spec.storage.s3
    if s3.endpoint is not None:
        yield _value(contract.ENV_S3_ENDPOINT, s3.endpoint)
    yield _value(contract.ENV_S3_REGION, s3.region)
    yield _value(contract.ENV_S3_PATH_STYLE, "true" if s3.path_style else "false")
    if s3.ca_bundle_config_map is not None:
        yield _value(contract.ENV_S3_CA_BUNDLE, contract.CA_BUNDLE_FILE)
    if s3.secret_name is not None:
        for key in contract.SECRET_KEYS:
            yield _secret(key, s3.secret_name, optional=key == contract.ENV_S3_SESSION_TOKEN)


def _model(job: FineTuneJob) -> Iterator[Object]:
    model = job.spec.model
    if model.hub is not None and model.hub.endpoint is not None:
        yield _value(contract.ENV_HUB_ENDPOINT, model.hub.endpoint)
    if model.hub is not None and model.hub.secret_name is not None:
        yield _secret(contract.ENV_HUB_TOKEN, model.hub.secret_name, optional=False)
    if model.cache is not None:
        yield _value(contract.ENV_MODEL_CACHE, contract.MODEL_CACHE_DIR)


def _network(job: FineTuneJob) -> Iterator[Object]:
    for name, value in network_environment(job).items():
        yield _value(name, value)


def _libraries() -> Iterator[Object]:
    # Whatever comes from a hub, the trainer brings itself; no library asks one behind its back.
    yield _value("HF_HUB_OFFLINE", "1")
    for name, value in PRIVATE.items():
        yield _value(name, value)


def _value(name: str, value: str) -> Object:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _secret(key: str, secret: str, optional: bool) -> Object:
    reference: Object = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
