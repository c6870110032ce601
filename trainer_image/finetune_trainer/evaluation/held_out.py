"""Evaluation on held-out rows that leaves no trace in the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.trainer_utils import EvalLoopOutput

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer as _Base
else:
    _Base = object

LARGEST_EXPONENT = 700.0
"""exp of more is no float; such a perplexity says only that the model has broken."""


class Meter(Protocol):
    """Adds up what the batches of one evaluation show."""

    def add(self, trainer: Any, batch: dict[str, Any]) -> int:
        """Take in a batch; returns its rows, those of all ranks, without what was added to fill it."""

    def metrics(self) -> dict[str, float]:
        """All metrics, by names without the prefix of the evaluation; `loss` among them."""

    def details(self) -> dict[str, Any]:
        """More for the report, as JSON."""


class HeldOutMixin(_Base):
    """Mix in before a Trainer class, and give `meter`: what makes the meter of an evaluation.

    Neither label smoothing nor dropout nor noise on embeddings plays a part, so that runs can be compared.
    """

    meter: Callable[[], Meter]
    details: dict[str, Any]
    """What the meter of the last evaluation told beside metrics."""

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The meter's metrics, under `<prefix>_`.

        No metrics when a callback breaks the evaluation off by should_training_stop: a part would mislead.
        """
        self.model.eval()
        # Set already when the last step is evaluated; what counts is whether a callback sets it meanwhile.
        ending, self.control.should_training_stop = self.control.should_training_stop, False
        meter, rows = self.meter(), 0
        # Opening a data loader draws a random number. A run that was stopped before an evaluation and goes on after it
        # must still draw the same ones for its dropout as a run that was not.
        with torch.random.fork_rng(devices=[]):
            for batch in dataloader:
                rows += meter.add(self, batch)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                if self.control.should_training_stop:
                    return EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=rows)
        self.control.should_training_stop = ending
        self.details = meter.details()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.metrics().items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)


class TokenMeter:
    """The loss of language models, each trained token counting the same.

    TRL's own evaluation averages the means of batches, so that short rows weigh more.
    """

    def __init__(self) -> None:
        self._loss = self._tokens = 0.0

    def add(self, trainer: Any, batch: dict[str, Any]) -> int:
        losses, counts = _row_losses(trainer, batch)
        self._loss += losses.double().sum().item()
        self._tokens += counts.sum().item()
        return len(losses)

    def metrics(self) -> dict[str, float]:
        """`loss` in nats per trained token, and `perplexity`, its exponential."""
        mean = self._loss / max(self._tokens, 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, LARGEST_EXPONENT))}

    def details(self) -> dict[str, Any]:
        return {}


def _row_losses(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, trained tokens) of each row of all ranks, without rows that were added to fill a batch."""
    inputs = trainer._prepare_inputs(batch)
    inputs["use_cache"] = False
    with torch.no_grad(), trainer.accelerator.autocast():
        outputs = trainer.model(**inputs, fused_lm_head=True)
    sums = -outputs.log_probs.float().sum(dim=-1), outputs.label_mask.sum(dim=-1)
    losses, counts = trainer.accelerator.gather_for_metrics(sums)
    return losses, counts
