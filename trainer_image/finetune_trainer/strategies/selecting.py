"""What the strategies that train a part of the base's own weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from finetune_api.selection import FisherSelection
from finetune_trainer.errors import UsageError
from finetune_trainer.fisher import Elements, PutBackCallback, fisher_information, largest, packed, unpacked
from finetune_trainer.strategies.base import ModelStrategy
from finetune_trainer.structure import Structure
from finetune_trainer.structure.modules import is_linear

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, Trainer

    from finetune_api.strategy import StrategySpec
    from finetune_trainer.loaded import Loaded

FIELD = "spec.strategy.select"


class SelectingStrategy(ModelStrategy):
    """Chosen parameters of the base learn, and of these perhaps only the elements that Fisher information picks."""

    def __init__(self, spec: StrategySpec) -> None:
        super().__init__(spec)
        self._choice: dict[str, torch.Tensor] = {}
        self._elements: list[Elements] = []

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        # The base's own precision is not known yet, and what is frozen must come out bit by bit as it went in.
        return torch.float32

    @abstractmethod
    def names(self, structure: Structure) -> set[str]:
        """The parameters that learn, before Fisher information narrows them down.

        Raises:
            UsageError: the spec names what the model does not have.
        """

    def prepare(self, base: Loaded) -> PreTrainedModel:
        model = base.model
        names = self.names(Structure.of(model))
        fisher = self.spec.select.fisher if self.spec.select else None
        if fisher is not None and not self._choice:
            self._choice = _picked(base, names, fisher)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names or base.is_fresh(name))
            if name in self._choice:
                self._narrow(parameter, unpacked(self._choice[name], parameter.shape))
        hold_small(model, base.compute)
        return model

    def _narrow(self, parameter: nn.Parameter, kept: torch.Tensor) -> None:
        # Frozen whole it costs no gradient; learning whole it needs no mask.
        parameter.requires_grad_(bool(kept.any()))
        if parameter.requires_grad and not kept.all():
            self._elements.append(Elements(parameter, kept))

    @property
    def chooses(self) -> bool:
        return self.spec.select is not None and self.spec.select.fisher is not None

    def choice(self) -> dict[str, torch.Tensor]:
        """Bits of the masks of what Fisher information has picked, by the parameter's name."""
        return self._choice

    def restore(self, choice: dict[str, torch.Tensor]) -> None:
        self._choice = choice

    def attach(self, trainer: Trainer) -> None:
        if self._elements:
            trainer.add_callback(PutBackCallback(self._elements))


def _picked(base: Loaded, names: set[str], fisher: FisherSelection) -> dict[str, torch.Tensor]:
    candidates = {name for name in names if not base.is_fresh(name)}
    if not candidates:
        raise UsageError(
            f"{FIELD}.fisher: all that is chosen is new to the model and learns whole",
            "remove fisher, or choose more of the model",
        )
    model: nn.Module = base.model
    model.to(base.device)
    information = fisher_information(base.model, candidates, base.examples(fisher.samples), base.compute)
    return {name: packed(kept) for name, kept in largest(information, fisher.fraction).items()}


def hold_small(model: nn.Module, compute: torch.dtype) -> None:
    """Put frozen linear layers into the precision of the pass, where not one of their bits is lost by it.

    A base that lies in bfloat16 so takes two bytes a frozen weight and not four, and is not cast anew in every pass.
    Only linear layers, which autocast casts anyway, whatever they are held in; in float32 there is no autocast, and
    everything stays as it is. Weights shared with an embedding stay too: its output would be rounded.
    """
    if compute is torch.float32:
        return
    shared = {id(parameter) for module in model.modules() if not is_linear(module) for parameter in _own(module)}
    for module in filter(is_linear, model.modules()):
        for parameter in _own(module):
            if not parameter.requires_grad and id(parameter) not in shared and not parameter.is_meta:
                small = parameter.data.to(compute)
                parameter.data = small if torch.equal(small.float(), parameter.data) else parameter.data


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)
