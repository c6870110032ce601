"""LoRA: low-rank updates beside a frozen base, delivered as an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune_trainer.errors import UsageError
from finetune_trainer.strategies.peft import PeftStrategy
from finetune_trainer.strategies.targets import ALL_LINEAR, ends_with, linear_names, matching, refuse_unknown_targets

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from finetune_api.strategy import LoraOptions
    from finetune_trainer.loaded import Loaded

FIELD = "spec.strategy.lora"


class Lora(PeftStrategy):
    """Adapters on linear modules, and whole modules where modulesToSave names some."""

    def config(self, base: Loaded) -> LoraConfig:
        from peft import LoraConfig

        options, model = self.spec.lora, base.model
        assert options is not None, "a resolved job has its options"
        targets, whole = options.target_modules, options.modules_to_save
        refuse_unknown_targets(model, targets, f"{FIELD}.targetModules", base.fresh, "strategy.lora.modulesToSave")
        refuse_unknown_modules(model, whole)
        refuse_unknown_ranks(model, options)
        return LoraConfig(
            task_type=base.peft_task,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=ALL_LINEAR if ALL_LINEAR in targets else list(targets),
            # Trained whole; an adapter beside that would be one too many.
            exclude_modules=list(base.fresh) or None,
            # PEFT takes the first that fits: the longest name, which says most.
            rank_pattern=dict(sorted(options.rank_pattern.items(), key=lambda rank: -rank[0].count("."))),
            modules_to_save=list(dict.fromkeys([*whole, *base.fresh])) or None,
            use_rslora=options.rs_lora,
            use_dora=options.dora,
            # An output head that shares its weights with the embedding goes on sharing them when it is trained.
            ensure_weight_tying=bool(whole) and bool(model.all_tied_weights_keys),
        )

    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        updates = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
        return any(tensor.norm() > 0 for tensor in updates)


def refuse_unknown_ranks(model: PreTrainedModel, options: LoraOptions) -> None:
    """Raise UsageError for a name in rankPattern that no adapted module has: its rank would be ignored."""
    adapted = linear_names(model) if ALL_LINEAR in options.target_modules else options.target_modules
    for name in options.rank_pattern:
        if not any(ends_with(full, target) for full in matching(model, name) for target in adapted):
            raise UsageError(
                f"{FIELD}.rankPattern: no module with an adapter is called {name}",
                f"use some of: {', '.join(adapted)}",
            )


def refuse_unknown_modules(model: PreTrainedModel, names: list[str]) -> None:
    """Raise UsageError for a name in modulesToSave that no module with parameters has."""
    for name in names:
        if not any(_has_parameters(module) for module in matching(model, name).values()):
            known = [child.rsplit(".", 1)[-1] for child, module in model.named_modules() if _has_parameters(module)]
            endings = [ending for ending in dict.fromkeys(known) if ending and not ending.isdigit()]
            raise UsageError(
                f"{FIELD}.modulesToSave: no module of the model is called {name}",
                f"use some of: {', '.join(endings[:24])}",
            )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
