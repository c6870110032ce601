"""The output's folder as a whole: whose it is, what is known already, and the result that is written last."""

from __future__ import annotations

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

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "finetune-operator")


class Divergence(Message):
    """After which checkpoint a step was not finite: tried again once, over all attempts of a job."""

    checkpoint: int


class Pin(Message):
    """Which model a job is trained from, where its address may come to mean another one."""

    uri: str


Kept = TypeVar("Kept", Measured, Divergence, Pin)


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

    def baseline(self) -> Measured | None:
        """What an earlier attempt of this job measured before training; a restart has no untrained model's time to
        lose."""
        return self._kept("baseline", Measured)

    def keep_baseline(self, measured: Measured) -> None:
        """Keep it for later attempts."""
        self._keep("baseline", measured)

    def pinned(self) -> str | None:
        """Where an earlier attempt of this job has found its model."""
        pin = self._kept("model", Pin)
        return pin.uri if pin else None

    def keep_pin(self, uri: str) -> None:
        """Keep it for later attempts."""
        self._keep("model", Pin(uri=uri))

    def diverged_from(self) -> int | None:
        """The step of the checkpoint after which this job has diverged, in this attempt or an earlier one."""
        found = self._kept("divergence", Divergence)
        return found.checkpoint if found else None

    def keep_divergence(self, checkpoint: int) -> None:
        """Keep it for later attempts; before the steps are tried again, so that a pod that is lost meanwhile counts."""
        self._keep("divergence", Divergence(checkpoint=checkpoint))

    def choice(self) -> dict[str, torch.Tensor]:
        """What the strategy chose in an earlier attempt of this job; empty where it has not chosen yet."""
        data = self._read(self._own("choice", "safetensors"))
        return load(data) if data else {}

    def keep_choice(self, choice: dict[str, torch.Tensor]) -> None:
        """Keep it for later attempts."""
        self._store.write_bytes(f"{self.root}/{self._own('choice', 'safetensors')}", save(choice))

    def write(self, name: str, message: Message) -> None:
        """Write a message as JSON under the folder."""
        self.write_text(name, message.model_dump_json(by_alias=True, exclude_none=True, indent=1))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file under the folder."""
        self._store.write_bytes(f"{self.root}/{name}", text.encode())

    def _keep(self, name: str, message: Message) -> None:
        self.write(self._own(name, "json"), message)

    def _kept(self, name: str, kind: type[Kept]) -> Kept | None:
        """What an earlier attempt of this job has left; None where it cannot be read."""
        data = self._read(self._own(name, "json"))
        try:
            return kind.model_validate_json(data) if data else None
        except ValidationError:
            return None

    def _own(self, name: str, ending: str) -> str:
        # One for each job: two that share an output by mistake must not change each other's course.
        return f"report/{name}-{self._job.metadata.uid}.{ending}"

    def _read(self, name: str) -> bytes | None:
        try:
            return self._store.read_bytes(f"{self.root}/{name}")
        except MissingError:
            return None


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
