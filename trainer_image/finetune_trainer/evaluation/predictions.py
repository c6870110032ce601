"""What a model with a head says to held-out rows, gathered over all ranks and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune_trainer.evaluation.targets import Target


class PredictionMeter:
    """Keeps the logits and labels of all rows: most metrics of classes are no means over batches."""

    def __init__(self, target: Target, metrics: Sequence[str]) -> None:
        """Args:
        metrics: names of those to be measured, beside the loss.
        """
        self._target = target
        self._metrics = metrics
        self._logits: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def add(self, trainer: Any, batch: dict[str, Any]) -> int:
        inputs = dict(trainer._prepare_inputs(batch))
        labels = inputs.pop("labels")
        with torch.no_grad(), trainer.accelerator.autocast():
            logits = trainer.model(**inputs).logits
        logits, labels = trainer.accelerator.gather_for_metrics((logits.float(), labels))
        self.take(logits, labels)
        return len(labels)

    def take(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count in rows that have been answered: (rows, outputs), and the labels as the loss takes them."""
        self._logits.append(logits.cpu())
        self._labels.append(labels.cpu())

    def metrics(self) -> dict[str, float]:
        """`loss`, the mean over rows, and what else was asked for."""
        logits, labels = self._rows()
        scores = self._target.scores(logits, labels) if self._metrics else {}
        loss = self._target.losses(logits, labels).double().mean().item()
        return {"loss": loss, **{name: scores[name] for name in self._metrics}}

    def details(self) -> dict[str, Any]:
        return self._target.details(*self._rows())

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(self._logits), torch.cat(self._labels)
