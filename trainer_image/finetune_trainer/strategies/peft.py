"""What all strategies that PEFT implements have in common."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from finetune_trainer.strategies.base import AdapterStrategy
from finetune_trainer.verification import ADVICE, VerificationError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Loaded

WEIGHTS_FILE = "adapter_model.safetensors"


class PeftStrategy(AdapterStrategy):
    """An adapter of PEFT over a frozen base."""

    loading = (
        "from peft import PeftModel\nfrom transformers import {loader}\n\n"
        'base = {loader}.from_pretrained("<base model>"{settings})\n'
        'model = PeftModel.from_pretrained(base, "<this folder>")'
    )

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        return compute

    @abstractmethod
    def config(self, base: Loaded) -> PeftConfig:
        """The options in PEFT's words, fresh modules among those that are trained and saved whole.

        Raises:
            UsageError: an option matches nothing in this architecture.
        """

    def prepare(self, base: Loaded) -> PreTrainedModel:
        from peft import get_peft_model

        config = self.config(base)
        base.model.requires_grad_(False)
        # autocast_adapter_dtype is on by default: what learns is float32, whatever the base is held in.
        return cast("PreTrainedModel", get_peft_model(base.model, config))

    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        adapted = cast("PeftModel", model)
        adapted.peft_config["default"].base_model_name_or_path = base_uri
        # Otherwise PEFT asks the hub whether the vocabulary has grown; ours never does.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)

    def apart(self, model: PreTrainedModel) -> PreTrainedModel:
        return cast("PreTrainedModel", cast("PeftModel", model).unload())

    def together(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
        from peft import PeftModel

        return cast("PreTrainedModel", PeftModel.from_pretrained(base, str(folder)))

    def merge(self, adapted: PreTrainedModel) -> PreTrainedModel:
        return cast("PreTrainedModel", cast("PeftModel", adapted).merge_and_unload())

    def refuse_untrained(self, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(folder / WEIGHTS_FILE)
        if not tensors:
            raise VerificationError(f"the adapter in {folder} holds no tensors", ADVICE)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise VerificationError(f"the adapter in {folder} holds numbers that are not finite", ADVICE)
        if not self.changes(tensors):
            raise VerificationError(
                "the adapter changes nothing: its numbers are as they were before training",
                "train for more steps, or with a higher hyperparameters.learningRate",
            )

    @abstractmethod
    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether an adapter with these tensors, by their names in the file, does anything to the base."""
