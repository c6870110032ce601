"""LayerNorm: the norms learn, and a whole model is delivered (arXiv 2403.20284)."""

from __future__ import annotations

from finetune_api.selection import ModelPart, ModuleKind
from finetune_trainer.errors import UsageError
from finetune_trainer.selection import chosen, refuse_missing
from finetune_trainer.strategies.selecting import FIELD, SelectingStrategy
from finetune_trainer.structure import Structure


class LayerNorm(SelectingStrategy):
    """All norms, or those of `select.layers`, or the part of them with the largest Fisher information."""

    def names(self, structure: Structure) -> set[str]:
        refuse_missing(structure, ModuleKind.LAYER_NORM, "spec.strategy.type", "set type to Partial and select to")
        layers = self.spec.select.layers if self.spec.select else None
        norms = chosen(structure, ModelPart(layers=layers, modules=[ModuleKind.LAYER_NORM]), FIELD)
        if layers is None:
            return norms
        # Here no kind is named beside the layers, so the norms outside of the blocks are not meant.
        within = {name for name in norms if structure.places[name].layer is not None}
        if not within:
            raise UsageError(f"{FIELD}.layers: these blocks have no norms", "remove layers: there are norms elsewhere")
        return within
