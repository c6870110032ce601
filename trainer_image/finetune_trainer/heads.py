"""Which modules of a model are its head, found by structure, and drawing them anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import transformers

from finetune_trainer.loaded import lies_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.model import Source

POOLER = "pooler"


def skeleton(source: Source, loader: str, outputs: int | None = None) -> PreTrainedModel:
    """The model without weights: parameters have shapes, but take no memory.

    Args:
        loader: name of the class in transformers, such as AutoModelForSequenceClassification.
        outputs: how many its head shall have, if not as many as the configuration says.
    """
    config = copy.deepcopy(source.config)
    if outputs is not None:
        config.num_labels = outputs
    with torch.device("meta"):
        model = getattr(transformers, loader).from_config(config, trust_remote_code=source.spec.trust_remote_code)
    return model  # type: ignore[no-any-return]


class Head:
    """The head of an architecture.

    Attributes:
        outputs: the modules that give the answers: those whose shapes change with their number.
        modules: all that a body alone does not have: the outputs, what else lies outside of the body, and its pooler.
    """

    def __init__(self, source: Source, loader: str) -> None:
        model = skeleton(source, loader)
        # By their shapes, since every architecture calls them otherwise: classifier, score, fc, logits_proj...
        wider = dict(skeleton(source, loader, outputs=source.config.num_labels + 1).named_parameters())
        self._body = model.base_model_prefix if hasattr(model, model.base_model_prefix) else None
        names = [name for name, _ in model.named_parameters()]
        outputs = {name for name, parameter in model.named_parameters() if parameter.shape != wider[name].shape}
        self.outputs = self._units(outputs)
        self.modules = self._units(
            name for name in names if name in outputs or self._is_outside(name) or POOLER in name.split(".")
        )

    def lacking(self, missing: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
        """Modules of the head that miss parameters, and the missing parameters of the body."""
        names = list(missing)
        lacking = tuple(unit for unit in self.modules if any(lies_in(name, (unit,)) for name in names))
        return lacking, [name for name in names if not lies_in(name, lacking)]

    def _is_outside(self, name: str) -> bool:
        return self._body is not None and name.partition(".")[0] != self._body

    def _units(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._unit(name) for name in names))

    def _unit(self, name: str) -> str:
        """What is replaced as one: outside of the body all that lies under one name, within it a single module."""
        if self._is_outside(name):
            return name.partition(".")[0]
        parts = name.split(".")
        return ".".join(parts[: parts.index(POOLER) + 1] if POOLER in parts else parts[:-1])


def draw_again(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give modules the random values with which the architecture starts."""
    for name in names:
        for module in model.get_submodule(name).modules():
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                # The library's initialisation leaves alone what is marked as loaded.
                tensor._is_hf_initialized = False
            with torch.no_grad():
                model._init_weights(module)
