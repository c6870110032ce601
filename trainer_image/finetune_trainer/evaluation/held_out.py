"""The loss on held-out rows, each trained token counting the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import EvalLoopOutput

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer as _Base
else:
    _Base = object

METRICS = ("eval_loss", "eval_perplexity")
LARGEST_EXPONENT = 700.0
"""exp of more is no float; such a perplexity says only that the model has broken."""


class HeldOutLossMixin(_Base):
    """Mix in before SFTTrainer: its evaluation averages the means of batches, so that short rows weigh more.

    Neither label smoothing nor dropout nor noise on embeddings plays a part, so that runs can be compared.
    """

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`<prefix>_loss` in nats per trained token and `<prefix>_perplexity`, its exponential.

        No metrics when a callback breaks the evaluation off by should_training_stop: a part would mislead.
        """
        self.model.eval()
        # Set already when the last step is evaluated; what counts is whether a callback sets it meanwhile.
        ending, self.control.should_training_stop = self.control.should_training_stop, False
        loss = tokens = rows = 0.0
        # Opening a data loader draws a random number. A run that was stopped before an evaluation and goes on after it
        # must still draw the same ones for its dropout as a run that was not.
        with torch.random.fork_rng(devices=[]):
            for batch in dataloader:
                losses, counts = self._row_losses(batch)
                loss += losses.double().sum().item()
                tokens += counts.sum().item()
                rows += len(losses)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                if self.control.should_training_stop:
                    return EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=int(rows))
        self.control.should_training_stop = ending
        mean = loss / max(tokens, 1)
        metrics = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, LARGEST_EXPONENT)),
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(rows))

    def _row_losses(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, trained tokens) of each row of all ranks, without rows that were added to fill a batch."""
        inputs = self._prepare_inputs(batch)
        inputs["use_cache"] = False
        with torch.no_grad(), self.accelerator.autocast():
            outputs = self.model(**inputs, fused_lm_head=True)
        sums = -outputs.log_probs.float().sum(dim=-1), outputs.label_mask.sum(dim=-1)
        losses, counts = self.accelerator.gather_for_metrics(sums)
        return losses, counts
