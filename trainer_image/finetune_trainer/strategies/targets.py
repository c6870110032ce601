"""Names of modules that a spec gives, held against the model: adapters of PEFT ignore most that match nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from finetune_trainer.errors import UsageError
from finetune_trainer.loaded import lies_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def linear_names(model: PreTrainedModel, fresh: tuple[str, ...] = ()) -> list[str]:
    """Last parts of the names of all linear modules but the output head and fresh ones, in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not lies_in(name, fresh)
    ]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in found))


def convolution_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all convolutions that take adapters where they are named."""
    found = [_ending(name) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in dict.fromkeys(found) if all(map(_takes_adapter, matching(model, name).values()))]


def _ending(name: str) -> str:
    """The last part of a name; of modules that are only numbered, with what numbers them."""
    *before, last = name.rsplit(".", 2)
    return f"{before[-1]}.{last}" if last.isdigit() and before else last


def refuse_unknown_targets(
    model: PreTrainedModel, targets: list[str], field: str, fresh: tuple[str, ...] = (), whole: str = ""
) -> None:
    """Raise UsageError for a target without a match; PEFT itself minds only when none has any.

    Args:
        field: where the targets stand, such as `spec.strategy.lora.targetModules`.
        whole: what of the spec trains the output head whole, if something does.
    """
    names = linear_names(model, fresh)
    advice = f"use some of: {', '.join(names)}" if names else _without_linears(model)
    if ALL_LINEAR in targets:
        if not names:
            raise UsageError(f"{field}: the model has no linear layers for all-linear", advice)
        return
    for target in targets:
        matches = matching(model, target)
        if not matches:
            raise UsageError(f"{field}: no module of the model is called {target}", advice)
        if all(lies_in(name, fresh) for name in matches):
            raise UsageError(f"{field}: {target} is new and is trained whole anyway", advice)
        if any(module is model.get_output_embeddings() for module in matches.values()):
            way_out = f"put {target} into {whole} to train it whole, or {advice}" if whole else advice
            raise UsageError(f"{field}: {target} is the output head, which takes no adapter", way_out)
        for module in matches.values():
            if not _takes_adapter(module):
                raise UsageError(f"{field}: {target} is {_kind(module)}, which takes no adapter", advice)


def _without_linears(model: PreTrainedModel) -> str:
    names = convolution_names(model)
    convolutions = f"name convolutions in targetModules ({', '.join(names[:12])}), or " if names else ""
    return f"{convolutions}use strategy Partial or Full"


def matching(model: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    """The modules of that name, or whose names end in it."""
    return {name: module for name, module in model.named_modules() if ends_with(name, target)}


def ends_with(name: str, ending: str) -> bool:
    """Whether the last parts of a dotted name are these."""
    return name == ending or name.endswith("." + ending)


def _takes_adapter(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # On convolutions in groups PEFT's cannot be merged, and not every rank fits.
    single = isinstance(module, nn.Conv2d) and module.groups == 1
    return single or isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _kind(module: nn.Module) -> str:
    return f"a {type(module).__name__}{' in groups' if getattr(module, 'groups', 1) > 1 else ''}"
