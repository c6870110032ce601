"""Parameter groups: other learning rates for parts of the model, and what weight decay spares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from finetune_api.hyperparameters import Hyperparameters, LearningRateGroup
from finetune_api.selection import ModuleKind
from finetune_trainer.errors import UsageError
from finetune_trainer.selection import chosen, refuse_missing
from finetune_trainer.structure import Structure

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer as _Base
else:
    _Base = object

FIELD = "spec.hyperparameters"


def peak_rates(model: nn.Module, learning: Collection[str], values: Hyperparameters) -> dict[str, float]:
    """The peak learning rate of every parameter that learns; empty where all have the same.

    With layerDecay d a parameter at depth l of a model of L blocks gets its group's rate times d^(L + 1 - l): what lies
    after the blocks the whole rate, the last block d of it, the first one d^L, the embedding d^(L + 1) (discriminative
    fine-tuning; Howard and Ruder, 2018, section 3.2). Adapters lie at the depth of the module that they sit in.

    Args:
        learning: names of the parameters that ever learn.

    Raises:
        UsageError: a group in which nothing learns, or layerDecay where there are no layers.
    """
    if values.layer_decay is None and not values.learning_rate_groups:
        return {}
    structure = Structure.of(model)
    rates = _by_group(structure, learning, values)
    if values.layer_decay is None:
        return rates
    if structure.layers == 0:
        raise UsageError(f"{FIELD}.layerDecay: the model has no blocks", "remove it, or set learningRateGroups")
    after = structure.layers + 1
    return {name: rate * values.layer_decay ** (after - structure.places[name].depth) for name, rate in rates.items()}


def _by_group(structure: Structure, learning: Collection[str], values: Hyperparameters) -> dict[str, float]:
    assert values.learning_rate is not None, "a resolved job has one"
    rates: dict[str, float] = {}
    for index, group in enumerate(values.learning_rate_groups or ()):
        for name in _members(structure, learning, rates, group, f"{FIELD}.learningRateGroups[{index}].select"):
            rates[name] = group.learning_rate
    return {name: rates.get(name, values.learning_rate) for name in structure.places if name in learning}


def _members(
    structure: Structure, learning: Collection[str], taken: Collection[str], group: LearningRateGroup, field: str
) -> set[str]:
    named = chosen(structure, group.select, field) & set(learning)
    if not named:
        raise UsageError(
            f"{field}: nothing that learns lies in it", f"choose from what learns: {what(structure, learning)}"
        )
    if named <= set(taken):
        raise UsageError(f"{field}: groups before it have all that it names", "put it before them, or remove it")
    return named - set(taken)


def what(structure: Structure, names: Collection[str]) -> str:
    """Where parameters lie, in words: kinds of modules, and numbers of blocks."""
    places = [place for name, place in structure.places.items() if name in names]
    kinds = [kind.value for kind in ModuleKind if any(place.kind is kind for place in places)]
    blocks = sorted({place.layer for place in places if place.layer is not None})
    layers = f"blocks {', '.join(map(str, blocks))}" if blocks else ""
    return "; ".join(filter(None, [", ".join(kinds), layers])) or "neither in a block nor in a kind of module"


def spared(model: nn.Module, kinds: Collection[ModuleKind]) -> frozenset[str]:
    """Names of the parameters that noWeightDecay exempts; raises UsageError for a kind that the model does not have."""
    if not kinds:
        return frozenset()
    structure = Structure.of(model)
    for kind in kinds:
        refuse_missing(structure, kind, f"{FIELD}.noWeightDecay")
    return frozenset(name for name, place in structure.places.items() if place.kind in kinds)


class ParameterGroupsMixin(_Base):
    """Mix in before a Trainer class; without rates and what is spared, its groups are those of the library."""

    rates: Mapping[str, float] = {}
    """Peak learning rates by parameter, of all that ever learn; empty: one for all."""
    undecayed: frozenset[str] = frozenset()
    """Parameters without weight decay, beside biases and norms."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay is for."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.undecayed]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The library's optimizer, over our groups where there are any."""
        if self.rates and self.optimizer is None:
            own = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, own)
            self.optimizer_cls_and_kwargs = (kind, {**settings, "params": self._groups(own)})
        return super().create_optimizer(model)

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The same ones in the same order every time, the highest rate first: it is what progress shows."""
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self.rates[name], name in decayed), []).append(parameter)
        return [
            {"params": groups[rate, decays], "lr": rate, "weight_decay": self.args.weight_decay if decays else 0.0}
            for rate, decays in sorted(groups, reverse=True)
        ]
