"""Partial: a part of the base's parameters learns, and a whole model is delivered."""

from __future__ import annotations

from finetune_trainer.selection import chosen
from finetune_trainer.strategies.selecting import FIELD, SelectingStrategy
from finetune_trainer.structure import Structure


class Partial(SelectingStrategy):
    """What `select` names by layers, kinds of modules, fine-tuned angle and Fisher information."""

    def names(self, structure: Structure) -> set[str]:
        select = self.spec.select
        assert select is not None, "the API refuses Partial without it"
        return chosen(structure, select, FIELD)
