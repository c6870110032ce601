"""What every strategy answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from finetune_api.job import StrategySpec

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


class Strategy(ABC):
    """Which parameters learn. Knows nothing of tasks, so that every sensible pair works."""

    output_kind: ClassVar[Literal["adapter", "model"]]

    def __init__(self, spec: StrategySpec) -> None:
        self.spec = spec

    @abstractmethod
    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        """In which precision the base is held when it is loaded."""

    def quantization(self, compute: torch.dtype) -> BitsAndBytesConfig | None:
        """How the base is quantised when it is loaded; None: not at all."""
        return None

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model (or PEFT's around it) with exactly those parameters trainable that shall learn, these in float32.

        Raises:
            UsageError: an option of the strategy matches nothing in this architecture.
        """

    @abstractmethod
    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        """Write what is delivered as safetensors with its configuration.

        Args:
            model: what prepare returned, trained.
            base_uri: where the base came from; an adapter names it.
            stored: precision in which the base lies in its folder; a whole model is delivered in it.
        """
