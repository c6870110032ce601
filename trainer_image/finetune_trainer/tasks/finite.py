"""Steps that are not finite are never taken."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.neftune import deactivate_neftune

from finetune_trainer.errors import DivergedError

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class FiniteStepsMixin(_Base):
    """Mix in before a Trainer class: a loss or gradient that is not finite ends the run before it reaches a weight."""

    def train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().train(*arguments, **named)
        except DivergedError:
            # The library takes its noise away only where training ends; another attempt would have twice as much.
            if self.neftune_noise_alpha is not None:
                deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
            raise

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        if self.accelerator.scaler is not None and self._anywhere(~torch.isfinite(loss)):
            raise self._diverged("loss", loss)
        return loss

    def _anywhere(self, flag: torch.Tensor) -> bool:
        """Whether a flag is set on any rank: all have to stop at the same step, or the others wait for ever."""
        if self.accelerator.num_processes > 1:
            flag = self.accelerator.reduce(flag.float(), reduction="sum")
        return bool(flag)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # A loss that is not finite shows here too, at one look a step; on every rank, since gradients are averaged over
        # all and the norm is that of all shards. With loss scaling (float16) infinite gradients
        # are part of the search for the scale, so there the loss is looked at.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            raise self._diverged("gradient", norm)
        return norm

    def _diverged(self, what: str, value: Any) -> DivergedError:
        number = float(value)
        shown = number if not math.isfinite(number) else "infinite or not a number on another rank"
        return DivergedError(
            f"the {what} became {shown} in step {self.state.global_step + 1}; that step was not taken",
            "lower hyperparameters.learningRate, lengthen the warm-up, or set maxGradNorm to 1; with model.dtype "
            "float16 try bfloat16",
        )
