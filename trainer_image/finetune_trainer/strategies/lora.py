"""LoRA: low-rank updates beside a frozen base, delivered as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from finetune_trainer.errors import UsageError
from finetune_trainer.strategies.base import Strategy

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class Lora(Strategy):
    """Adapters on linear modules, and whole modules where modulesToSave names some."""

    output_kind = "adapter"

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        return compute

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import get_peft_model

        config = self.peft_config(model)
        model.requires_grad_(False)
        # autocast_adapter_dtype is on by default: what learns is float32, whatever the base is held in.
        return cast("PreTrainedModel", get_peft_model(model, config))

    def peft_config(self, model: PreTrainedModel) -> LoraConfig:
        """The options in PEFT's words.

        Raises:
            UsageError: a name in targetModules or modulesToSave matches nothing that could take it.
        """
        from peft import LoraConfig, TaskType

        options = self.spec.lora
        assert options is not None, "a resolved job has its options"
        refuse_unknown_targets(model, options.target_modules)
        refuse_unknown_modules(model, options.modules_to_save)
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=ALL_LINEAR if ALL_LINEAR in options.target_modules else list(options.target_modules),
            modules_to_save=list(options.modules_to_save) or None,
            use_rslora=options.rs_lora,
            use_dora=options.dora,
            # An output head that shares its weights with the embedding goes on sharing them when it is trained.
            ensure_weight_tying=bool(options.modules_to_save) and model.config.get_text_config().tie_word_embeddings,
        )

    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        adapted = cast("PeftModel", model)
        adapted.peft_config["default"].base_model_name_or_path = base_uri
        # Otherwise PEFT asks the hub whether the vocabulary has grown; ours never does.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear modules but the output head, in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in found))


def refuse_unknown_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Raise UsageError for a target without a match; PEFT itself minds only when none has any."""
    names = linear_names(model)
    advice = f"use some of: {', '.join(names)}" if names else "use strategy Full"
    if ALL_LINEAR in targets:
        if not names:
            raise UsageError("spec.strategy.lora.targetModules: the model has no linear layers for all-linear", advice)
        return
    for target in targets:
        matches = _matching(model, target)
        if not matches:
            raise UsageError(f"spec.strategy.lora.targetModules: no module of the model is called {target}", advice)
        if any(module is model.get_output_embeddings() for module in matches):
            raise UsageError(
                f"spec.strategy.lora.targetModules: {target} is the output head, which takes no adapter",
                f"put {target} into strategy.lora.modulesToSave to train it whole, or {advice}",
            )
        if not all(_takes_adapter(module) for module in matches):
            kind = type(matches[0]).__name__
            raise UsageError(f"spec.strategy.lora.targetModules: {target} is a {kind}, not a linear layer", advice)


def refuse_unknown_modules(model: PreTrainedModel, names: list[str]) -> None:
    """Raise UsageError for a name in modulesToSave that no module with parameters has."""
    for name in names:
        if not any(next(module.parameters(), None) is not None for module in _matching(model, name)):
            known = [
                child
                for child, module in model.named_modules()
                if child and next(module.parameters(), None) is not None
            ]
            endings = list(
                dict.fromkeys(child.rsplit(".", 1)[-1] for child in known if not child.rsplit(".", 1)[-1].isdigit())
            )
            raise UsageError(
                f"spec.strategy.lora.modulesToSave: no module of the model is called {name}",
                f"use some of: {', '.join(endings[:24])}",
            )


def _matching(model: PreTrainedModel, target: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name == target or name.endswith("." + target)]


def _takes_adapter(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)
