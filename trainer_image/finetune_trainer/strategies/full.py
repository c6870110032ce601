"""Full: every parameter learns, and a whole model is delivered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune_trainer.strategies.base import ModelStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Loaded


class Full(ModelStrategy):
    """All parameters."""

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        # Master weights: at usual learning rates an update is smaller than what bfloat16 can add to a weight.
        return torch.float32

    def prepare(self, base: Loaded) -> PreTrainedModel:
        base.model.requires_grad_(True)
        return base.model
