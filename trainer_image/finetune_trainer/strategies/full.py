"""Full: every parameter learns, and a whole model is delivered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_trainer.strategies.base import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Strategy):
    """All parameters."""

    output_kind = "model"

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        # Master weights: at usual learning rates an update is smaller than what bfloat16 can add to a weight.
        return torch.float32

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(True)
        return model

    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        save_model(model, folder, stored)


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a whole model in shards of safetensors, its floating point weights in dtype; the model is cast in place."""
    model.to(dtype)
    model.config.dtype = dtype
    # Turned off for training only; who loads the model wants to generate with it.
    model.config.use_cache = True
    model.save_pretrained(folder)
