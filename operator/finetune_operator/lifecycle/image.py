"""The image of a job's trainer, kept from its first pod to its last.

An upgrade of the operator brings another one. A job that is under way goes on with its own, though its Indexed Job may
have to be made anew, and with the very bytes: a tag may be pushed again in the meantime.
"""

from __future__ import annotations

from finetune_api.contract import TRAINER_CONTAINER
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster.port import Object
from finetune_operator.observed import Observed, current_pods, trainer_status


def with_image(status: FineTuneJobStatus, observed: Observed) -> FineTuneJobStatus:
    """By its digest as soon as a node says what it has pulled; one that was carried to the node by hand has none."""
    workload, known = observed.workload, status.trainer_image or ""
    if workload is None or "@" in known:
        return status
    containers = workload["spec"]["template"]["spec"].get("containers") or []
    named = next((str(item["image"]) for item in containers if item["name"] == TRAINER_CONTAINER), "")
    pulled = (pinned for pod in current_pods(observed) if (pinned := _pulled(pod, _repository(named))))
    image = named if "@" in named else next(pulled, named)
    return status if image == known or not image else status.model_copy(update={"trainer_image": image})


def _pulled(pod: Object, repository: str) -> str:
    """repository@sha256:... of what the trainer runs; empty where it did not come from there: what was loaded into a
    node has a digest too, by which nobody else finds it."""
    told = str(trainer_status(pod).get("imageID") or "")
    place, _, digest = told.rpartition("://")[2].partition("@")
    same = place in (repository, f"docker.io/{repository}", f"docker.io/library/{repository}")
    return f"{repository}@{digest}" if same and digest.startswith("sha256:") else ""


def _repository(image: str) -> str:
    """Without its tag; a port of the registry is none."""
    folder, slash, last = image.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}"
