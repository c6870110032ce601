"""Partial: a part of the base's parameters learns, and a whole model is delivered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from finetune_trainer.angle import RANKED, Angle, first_parts, measure, read
from finetune_trainer.selection import chosen
from finetune_trainer.strategies.selecting import FIELD, SelectingStrategy
from finetune_trainer.structure import Structure

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from finetune_trainer.strategies.base import Fetch

ANGLE = f"{FIELD}.angle"


class Partial(SelectingStrategy):
    """What `select` names by layers, kinds of modules, fine-tuned angle and Fisher information."""

    _base: Path
    _fine_tuned: Path
    """Angles, or the folder of a model to measure them from."""

    def gather(self, fetch: Fetch, base: Path) -> None:
        angle = self.spec.select.angle if self.spec.select else None
        if angle is not None:
            self._base, self._fine_tuned = base, fetch(f"{ANGLE}.from", angle.from_)

    def names(self, structure: Structure) -> set[str]:
        select = self.spec.select
        assert select is not None, "the API refuses Partial without it"
        names = chosen(structure, select, FIELD)
        if select.angle is None:
            return names
        first = first_parts(structure, names, self._angles(structure.model), select.angle, ANGLE)
        # Who names no kinds wants the ranked parts alone; other kinds that are named learn as without a ranking.
        return first | {name for name in names if select.modules and structure.places[name].kind not in RANKED}

    def _angles(self, model: nn.Module) -> list[Angle]:
        if self._fine_tuned.is_file():
            return read(self._fine_tuned, f"{ANGLE}.from")
        return measure(cast("PreTrainedModel", model), self._base, self._fine_tuned)
