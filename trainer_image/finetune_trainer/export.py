"""What is delivered: written, uploaded, read back from the bucket and proven to be what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_api.job import FineTuneJobSpec
from finetune_trainer import verification
from finetune_trainer.gathering import put, trainable_state, whole
from finetune_trainer.model import Source
from finetune_trainer.storage import Store
from finetune_trainer.strategies.base import AdapterStrategy, save_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from finetune_trainer.session import Session


def collect(session: Session, rebuild: Callable[[], PreTrainedModel]) -> None:
    """Give rank 0 the whole model in place of its shards: what was trained, in a model that is built anew.

    A collective; the others keep their shards, which they may let go. Tensors travel one at a time, so that rank 0 has
    one whole model at most, and the moments are given up before.

    Args:
        rebuild: gives the model as it was before training; called on rank 0 alone.

    Raises:
        VerificationError: it does not answer as the one in shards.
    """
    trainer = session.trainer
    probe = session.task.probe(trainer.model)
    with trainer.accelerator.autocast():
        expected = verification.logits(trainer.model, probe)
    trainer.optimizer.state.clear()
    model = rebuild() if trainer.args.should_save else None
    targets = trainable_state(model, trainer.learning) if model is not None else {}
    for name, tensor in trainable_state(trainer.model, trainer.learning).items():
        found = whole(tensor)
        if model is not None:
            put(targets[name], found)
    if model is None:
        return
    here = {name: tensor.to(model.device) for name, tensor in probe.items()}
    verification.same(expected, verification.logits(model, here), session.compute.dtype, "the gathered model")
    trainer.model = model


@dataclass(frozen=True)
class Exporter:
    """Delivers the trained model of a session to the output's folder.

    Args:
        alive: called between the steps of an export, and while files are on their way; raises when the pod must go.
    """

    store: Store
    spec: FineTuneJobSpec
    session: Session
    scratch: Path
    alive: Callable[[], None]

    def deliver(self, card: Callable[[str], str]) -> Path:
        """Deliver the adapter or model, and with output.merge the merged model; the session's model is used up.

        Args:
            card: gives the model card, in Markdown, for `adapter` or `model`.

        Returns:
            A folder on this machine with what lies in the output's.

        Raises:
            TrainerError: what can be read back is not what was trained.
        """
        strategy, model = self.session.strategy, self.session.trainer.model
        kind = strategy.output_kind
        folder = self._fresh(kind)
        strategy.export(model, folder, self.spec.model.uri, self.stored)
        self._write_beside(folder, model, card(kind))
        delivered = self._round_trip(folder, kind)
        probe = self.session.task.probe(model)
        if not isinstance(strategy, AdapterStrategy):
            strategy.refuse_untrained(model, self.session.base.folder, delivered)
            self._verify_model(model, delivered, probe)
            return delivered
        verification.adapter(strategy, model, delivered, probe, self.session.compute.dtype)
        if self.spec.output.merge:
            self.alive()
            self._deliver_merged(strategy, delivered, {name: tensor.cpu() for name, tensor in probe.items()}, card)
        return delivered

    @property
    def stored(self) -> torch.dtype:
        """The precision in which the base lies in its folder."""
        return self.session.config.dtype or torch.float32

    @property
    def _lowest_precision(self) -> torch.dtype:
        return max(self.stored, self.session.compute.dtype, key=verification.TOLERANCE.__getitem__)

    def _verify_model(self, model: PreTrainedModel, delivered: Path, probe: verification.Probe) -> None:
        expected = verification.logits(model, probe)
        again = self._load(delivered, self.stored, self.session.compute.attention, model.config).to(model.device)
        uri = f"{self.spec.output.uri.rstrip('/')}/model"
        verification.same(expected, verification.logits(again, probe), self._lowest_precision, uri)

    def _deliver_merged(
        self, strategy: AdapterStrategy, adapter: Path, probe: verification.Probe, card: Callable[[str], str]
    ) -> None:
        """Merge into the base in float32, as it was before any quantisation: a 4-bit base would lose the update."""
        uri = f"{self.spec.output.uri.rstrip('/')}/model"
        base = self._load(self.session.base.folder, torch.float32, "sdpa", self.session.config)
        adapted = strategy.together(base, adapter)
        expected = verification.logits(adapted, probe)
        merged = strategy.merge(adapted)
        verification.same(expected, verification.logits(merged, probe), torch.float32, uri)
        folder = self._fresh("model")
        save_model(merged, folder, self.stored)
        self._write_beside(folder, merged, card("model"))
        expected = verification.logits(merged, probe)
        delivered = self._round_trip(folder, "model")
        verification.differs_from(self.session.base.folder, delivered)
        again = self._load(delivered, self.stored, "sdpa", merged.config)
        verification.same(expected, verification.logits(again, probe), self.stored, uri)

    def _load(self, folder: Path, dtype: torch.dtype, attention: str, config: PretrainedConfig) -> PreTrainedModel:
        return self.session.task.load(Source(folder, self.spec.model, config, dtype, attention)).model

    def _fresh(self, kind: str) -> Path:
        folder = self.scratch / "export" / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _write_beside(self, folder: Path, model: PreTrainedModel, card: str) -> None:
        self.session.processor.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        (folder / "README.md").write_text(card, "utf-8")

    def _round_trip(self, folder: Path, kind: str) -> Path:
        """Upload a folder, and bring it back from the bucket."""
        uri = f"{self.spec.output.uri.rstrip('/')}/{kind}"
        # What an attempt before this one left, under names that this one may not use, would be part of the model.
        self.store.delete([info.uri for info in self.store.list(uri + "/")])
        self.store.upload_folder(folder, uri, self._moving)
        self.alive()
        back = self.scratch / "delivered" / kind
        shutil.rmtree(back, ignore_errors=True)
        self.store.download(uri + "/", back, self._moving)
        return self.store.folder(uri + "/", back)

    def _moving(self, *_: int) -> None:
        self.alive()
