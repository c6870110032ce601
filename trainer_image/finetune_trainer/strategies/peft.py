"""What all strategies that PEFT implements have in common."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from finetune_trainer.precision import hold_in_float32
from finetune_trainer.strategies.base import AdapterStrategy
from finetune_trainer.strategies.merging import Merged

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.utils import ModulesToSaveWrapper
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Loaded
    from finetune_trainer.tensors import Numbers


def whole_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The modules that are trained whole by their names, each with its frozen original."""
    from peft.utils import ModulesToSaveWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


class PeftStrategy(AdapterStrategy):
    """An adapter of PEFT over a frozen base."""

    library = "peft"
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

        config, spoken = self.config(base), base.model.dtype
        base.model.requires_grad_(False)
        # autocast_adapter_dtype is on by default: the adapter is float32, whatever the base is held in.
        model = get_peft_model(base.model, config)
        for wrapper in whole_modules(model).values():
            hold_in_float32(wrapper.modules_to_save["default"], spoken)
        return cast("PreTrainedModel", model)

    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        adapted = cast("PeftModel", model)
        adapted.peft_config["default"].base_model_name_or_path = base_uri
        # Otherwise PEFT asks the hub whether the vocabulary has grown; ours never does.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)

    def apart(self, model: PreTrainedModel) -> PreTrainedModel:
        adapted = cast("PeftModel", model)
        # PEFT would leave the trained ones in their places.
        originals = {n: whole.original_module for n, whole in whole_modules(adapted.get_base_model()).items()}
        base = self.unloaded(adapted)
        for name, original in originals.items():
            base.set_submodule(name, original)
        return base

    def unloaded(self, adapted: PeftModel) -> PreTrainedModel:
        """The model inside, without what the adapter has put into it."""
        return cast("PreTrainedModel", adapted.unload())

    def together(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
        from peft import PeftModel

        return cast("PreTrainedModel", PeftModel.from_pretrained(base, str(folder)))

    def merged(self, adapted: PreTrainedModel, base: Numbers) -> Merged:
        model = cast("PeftModel", adapted)
        whole = whole_modules(model.get_base_model())
        return Merged(model, base, {name: wrapper.modules_to_save["default"] for name, wrapper in whole.items()})
