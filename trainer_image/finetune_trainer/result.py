"""The output's folder as a whole: whose it is, what is known already, and the result that is written last."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from safetensors.torch import load, save

from finetune_api.common import Message
from finetune_api.contract import Result
from finetune_api.job import FineTuneJob
from finetune_trainer.checkpoints import catalog
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation import Measured
from finetune_trainer.storage import MissingError, Store

if TYPE_CHECKING:
    import torch

CHOICE_FILE = "report/choice.safetensors"
DIVERGENCE_FILE = "report/divergence.json"

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "finetune-operator")


class Baseline(Measured):
    """What the tuned model is compared with: found once for a job, since a restart has no untrained model's time to
    lose."""

    uid: str


class Divergence(Message):
    """After which checkpoint a step was not finite: tried again once, over all attempts of a job."""

    uid: str
    checkpoint: int


class Pin(Message):
    """Which model a job is trained from, where its address may come to mean another one."""

    uid: str
    uri: str


Kept = TypeVar("Kept", Baseline, Divergence, Pin)


class Output:
    """`output.uri` of one job."""

    def __init__(self, store: Store, job: FineTuneJob) -> None:
        self._store = store
        self._job = job
        self.root = job.spec.output.uri.rstrip("/")
        self.checkpoints = f"{self.root}/checkpoints"

    def refuse_foreign(self) -> None:
        """Raise UsageError when the folder holds another job's checkpoints; cheap, to be asked before writing to it."""
        newest = next(catalog.complete(self._store, self.checkpoints), None)
        if newest is not None:
            newest.refuse_foreign(self._job.metadata.uid, self.checkpoints)

    def finished(self) -> Result | None:
        """The result of this very job, if an earlier attempt has delivered it.

        Raises:
            UsageError: the folder holds another job's result, which is never overwritten.
        """
        data = self._read("result.json")
        if data is None:
            return None
        try:
            result = Result.model_validate_json(data)
        except ValidationError as error:
            raise UsageError(
                f"spec.output.uri: {self.root}/result.json is not ours: {error.error_count()} fields are wrong",
                "name another output.uri",
            ) from error
        if result.uid != self._job.metadata.uid:
            raise UsageError(
                f"spec.output.uri: {self.root} holds the result of another job ({result.job}, uid {result.uid})",
                "name another output.uri, or delete that folder if its content is no longer needed",
            )
        return result

    def baseline(self) -> Baseline | None:
        """What an earlier attempt of this job measured before training."""
        return self._kept("report/baseline.json", Baseline)

    def keep_baseline(self, measured: Measured) -> None:
        """Keep it for later attempts."""
        self.write("report/baseline.json", Baseline(uid=self._job.metadata.uid, **measured.model_dump()))

    def pinned(self) -> str | None:
        """Where an earlier attempt of this job has found its model."""
        pin = self._kept(self._pin_file, Pin)
        return pin.uri if pin else None

    def keep_pin(self, uri: str) -> None:
        """Keep it for later attempts."""
        self.write(self._pin_file, Pin(uid=self._job.metadata.uid, uri=uri))

    @property
    def _pin_file(self) -> str:
        # One for each job: two that share an output by mistake must not change each other's model.
        return f"report/model-{self._job.metadata.uid}.json"

    def diverged_from(self) -> int | None:
        """The step of the checkpoint after which this job has diverged, in this attempt or an earlier one."""
        found = self._kept(DIVERGENCE_FILE, Divergence)
        return found.checkpoint if found else None

    def keep_divergence(self, checkpoint: int) -> None:
        """Keep it for later attempts; before the steps are tried again, so that a pod that is lost meanwhile counts."""
        self.write(DIVERGENCE_FILE, Divergence(uid=self._job.metadata.uid, checkpoint=checkpoint))

    def choice(self) -> dict[str, torch.Tensor]:
        """What the strategy chose in an earlier attempt of this job; empty where it has not chosen yet."""
        data = self._read(CHOICE_FILE)
        if data is None or _metadata(data).get("uid") != self._job.metadata.uid:
            return {}
        return load(data)

    def keep_choice(self, choice: dict[str, torch.Tensor]) -> None:
        """Keep it for later attempts."""
        data = save(choice, metadata={"uid": self._job.metadata.uid})
        self._store.write_bytes(f"{self.root}/{CHOICE_FILE}", data)

    def write(self, name: str, message: Message) -> None:
        """Write a message as JSON under the folder."""
        self.write_text(name, message.model_dump_json(by_alias=True, exclude_none=True, indent=1))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file under the folder."""
        self._store.write_bytes(f"{self.root}/{name}", text.encode())

    def _kept(self, name: str, kind: type[Kept]) -> Kept | None:
        """What an earlier attempt of this job has left; None where another job did, or it cannot be read."""
        data = self._read(name)
        try:
            kept = kind.model_validate_json(data) if data else None
        except ValidationError:
            return None
        return kept if kept and kept.uid == self._job.metadata.uid else None

    def _read(self, name: str) -> bytes | None:
        try:
            return self._store.read_bytes(f"{self.root}/{name}")
        except MissingError:
            return None


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON, after eight bytes with its length."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__") or {})


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def samples(prompts: list[Any], before: list[str], after: list[str]) -> list[dict[str, str]]:
    """Held-out prompts with the expected answer, and the model's before and after."""
    return [
        {"prompt": sample.prompt, "reference": sample.reference, "before": old, "after": new}
        for sample, old, new in zip(prompts, before, after, strict=True)
    ]
