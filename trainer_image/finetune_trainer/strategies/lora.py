"""LoRA: low-rank updates beside a frozen base, delivered as an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune_trainer.errors import UsageError
from finetune_trainer.strategies.peft import PeftStrategy

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from finetune_api.strategy import LoraOptions
    from finetune_trainer.loaded import Loaded

ALL_LINEAR = "all-linear"
TARGETS = "spec.strategy.lora.targetModules"


class Lora(PeftStrategy):
    """Adapters on linear modules, and whole modules where modulesToSave names some."""

    def config(self, base: Loaded) -> LoraConfig:
        from peft import LoraConfig

        options, model = self.spec.lora, base.model
        assert options is not None, "a resolved job has its options"
        refuse_unknown_targets(model, options.target_modules, base.fresh)
        refuse_unknown_modules(model, options.modules_to_save)
        refuse_unknown_ranks(model, options)
        whole = list(dict.fromkeys([*options.modules_to_save, *base.fresh]))
        return LoraConfig(
            task_type=base.peft_task,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=ALL_LINEAR if ALL_LINEAR in options.target_modules else list(options.target_modules),
            # Trained whole; an adapter beside that would be one too many.
            exclude_modules=list(base.fresh) or None,
            rank_pattern=dict(options.rank_pattern),
            modules_to_save=whole or None,
            use_rslora=options.rs_lora,
            use_dora=options.dora,
            # An output head that shares its weights with the embedding goes on sharing them when it is trained.
            ensure_weight_tying=bool(whole) and bool(model.all_tied_weights_keys),
        )

    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        updates = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
        return any(tensor.norm() > 0 for tensor in updates)


def linear_names(model: PreTrainedModel, fresh: tuple[str, ...] = ()) -> list[str]:
    """Last parts of the names of all linear modules but the output head and fresh ones, in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not _lies_in(name, fresh)
    ]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in found))


def refuse_unknown_targets(model: PreTrainedModel, targets: list[str], fresh: tuple[str, ...] = ()) -> None:
    """Raise UsageError for a target without a match; PEFT itself minds only when none has any."""
    names = linear_names(model, fresh)
    advice = f"use some of: {', '.join(names)}" if names else _without_linears(model)
    if ALL_LINEAR in targets:
        if not names:
            raise UsageError(f"{TARGETS}: the model has no linear layers for all-linear", advice)
        return
    for target in targets:
        matches = _matching(model, target)
        if not matches:
            raise UsageError(f"{TARGETS}: no module of the model is called {target}", advice)
        if all(_lies_in(name, fresh) for name in matches):
            raise UsageError(f"{TARGETS}: {target} is new and is trained whole anyway", advice)
        if any(module is model.get_output_embeddings() for module in matches.values()):
            raise UsageError(
                f"{TARGETS}: {target} is the output head, which takes no adapter",
                f"put {target} into strategy.lora.modulesToSave to train it whole, or {advice}",
            )
        for module in matches.values():
            if not _takes_adapter(module):
                raise UsageError(f"{TARGETS}: {target} is {_kind(module)}, which takes no adapter", advice)


def _without_linears(model: PreTrainedModel) -> str:
    found = [_ending(name) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    names = [name for name in dict.fromkeys(found) if all(map(_takes_adapter, _matching(model, name).values()))]
    convolutions = f"name convolutions in targetModules ({', '.join(names[:12])}), or " if names else ""
    return f"{convolutions}use strategy Partial or Full"


def _ending(name: str) -> str:
    """The last part of a name; of modules that are only numbered, with what numbers them."""
    *before, last = name.rsplit(".", 2)
    return f"{before[-1]}.{last}" if last.isdigit() and before else last


def refuse_unknown_ranks(model: PreTrainedModel, options: LoraOptions) -> None:
    """Raise UsageError for a name in rankPattern that no adapted module has: its rank would be ignored."""
    adapted = linear_names(model) if ALL_LINEAR in options.target_modules else options.target_modules
    for name in options.rank_pattern:
        if not any(_ends_with(full, target) for full in _matching(model, name) for target in adapted):
            raise UsageError(
                f"spec.strategy.lora.rankPattern: no module with an adapter is called {name}",
                f"use some of: {', '.join(adapted)}",
            )


def refuse_unknown_modules(model: PreTrainedModel, names: list[str]) -> None:
    """Raise UsageError for a name in modulesToSave that no module with parameters has."""
    for name in names:
        if not any(_has_parameters(module) for module in _matching(model, name).values()):
            known = [child.rsplit(".", 1)[-1] for child, module in model.named_modules() if _has_parameters(module)]
            endings = [ending for ending in dict.fromkeys(known) if ending and not ending.isdigit()]
            raise UsageError(
                f"spec.strategy.lora.modulesToSave: no module of the model is called {name}",
                f"use some of: {', '.join(endings[:24])}",
            )


def _matching(model: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if _ends_with(name, target)}


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _lies_in(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _takes_adapter(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # On convolutions in groups PEFT's cannot be merged, and not every rank fits.
    single = isinstance(module, nn.Conv2d) and module.groups == 1
    return single or isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _kind(module: nn.Module) -> str:
    return f"a {type(module).__name__}{' in groups' if getattr(module, 'groups', 1) > 1 else ''}"
