"""What is delivered: written, uploaded, read back from the bucket and proven to be what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune_api.job import FineTuneJobSpec
from finetune_trainer import verification
from finetune_trainer.hardware import Compute
from finetune_trainer.model import load_weights
from finetune_trainer.storage import Store
from finetune_trainer.strategies.full import save_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finetune_trainer.strategies import Strategy

PROBE_ROWS = 2
PROBE_TOKENS = 64
"""Enough to tell a wrong weight, little enough to be free."""


@dataclass(frozen=True)
class Exporter:
    """Delivers a trained model to the output's folder.

    Args:
        base: folder of the base model; config its configuration as it was read.
        probe: token ids, (rows, tokens), on which the delivered must answer as the trained.
        stop: called between the steps of an export; raises when the pod must go.
    """

    store: Store
    spec: FineTuneJobSpec
    strategy: Strategy
    tokenizer: PreTrainedTokenizerBase
    base: Path
    config: PretrainedConfig
    compute: Compute
    probe: torch.Tensor
    scratch: Path
    stop: Callable[[], None]

    @property
    def uri(self) -> str:
        """Where the adapter or model lies."""
        return f"{self.spec.output.uri.rstrip('/')}/{self.strategy.output_kind}"

    def deliver(self, model: PreTrainedModel, card: Callable[[str], str]) -> None:
        """Deliver the adapter or model, and with output.merge the merged model; `model` is used up.

        Args:
            card: gives the model card, in Markdown, for `adapter` or `model`.

        Raises:
            TrainerError: what can be read back is not what was trained.
        """
        kind = self.strategy.output_kind
        folder = self._fresh(kind)
        self.strategy.export(model, folder, self.spec.model.uri, self.stored)
        self._write_beside(folder, model, card(kind))
        delivered = self._round_trip(folder, kind)
        if kind == "model":
            self._verify_model(model, delivered)
            return
        verification.adapter(cast("PeftModel", model), delivered, self.probe, self.compute.dtype)
        if self.spec.output.merge:
            self.stop()
            self._deliver_merged(delivered, card("model"))

    @property
    def stored(self) -> torch.dtype:
        """The precision in which the base lies in its folder."""
        return self.config.dtype or torch.float32

    @property
    def _lowest_precision(self) -> torch.dtype:
        return max(self.stored, self.compute.dtype, key=verification.TOLERANCE.__getitem__)

    def _verify_model(self, model: PreTrainedModel, delivered: Path) -> None:
        verification.differs_from(self.base, delivered)
        expected = verification.logits(model, self.probe)
        again = load_weights(
            delivered, self.spec.model, self.config, dtype=self.stored, attention=self.compute.attention
        )
        found = verification.logits(again.to(model.device), self.probe)
        verification.same(expected, found, self._lowest_precision, self.uri)

    def _deliver_merged(self, adapter: Path, card: str) -> None:
        """Merge into the base in float32, as it was before any quantisation: a 4-bit base would lose the update."""
        from peft import PeftModel

        uri = f"{self.spec.output.uri.rstrip('/')}/model"
        base = load_weights(self.base, self.spec.model, self.config, dtype=torch.float32, attention="sdpa")
        adapted = PeftModel.from_pretrained(base, str(adapter))
        expected = verification.logits(adapted, self.probe.cpu())
        merged = adapted.merge_and_unload()
        verification.same(expected, verification.logits(merged, self.probe.cpu()), torch.float32, uri)
        folder = self._fresh("model")
        save_model(merged, folder, self.stored)
        self._write_beside(folder, merged, card)
        expected = verification.logits(merged, self.probe.cpu())
        delivered = self._round_trip(folder, "model")
        verification.differs_from(self.base, delivered)
        again = load_weights(delivered, self.spec.model, self.config, dtype=self.stored, attention="sdpa")
        verification.same(expected, verification.logits(again, self.probe.cpu()), self.stored, uri)

    def _fresh(self, kind: str) -> Path:
        folder = self.scratch / "export" / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _write_beside(self, folder: Path, model: PreTrainedModel, card: str) -> None:
        self.tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        (folder / "README.md").write_text(card, "utf-8")

    def _round_trip(self, folder: Path, kind: str) -> Path:
        """Upload a folder, and bring it back from the bucket."""
        uri = f"{self.spec.output.uri.rstrip('/')}/{kind}"
        # What an attempt before this one left, under names that this one may not use, would be part of the model.
        self.store.delete([info.uri for info in self.store.list(uri + "/")])
        self.store.upload_folder(folder, uri)
        self.stop()
        back = self.scratch / "delivered" / kind
        shutil.rmtree(back, ignore_errors=True)
        self.store.download(uri + "/", back)
        return self.store.folder(uri + "/", back)


def probe_of(rows: Any, device: torch.device) -> torch.Tensor:
    """Token ids of the first rows of a dataset, (rows, tokens), cut to the same length."""
    ids = [rows[i]["input_ids"][:PROBE_TOKENS] for i in range(min(PROBE_ROWS, len(rows)))]
    width = min(map(len, ids))
    return torch.tensor([row[:width] for row in ids], device=device)
