"""Where every parameter of a model lies and what it is part of, found by structure, whatever the architecture."""

from __future__ import annotations

from finetune_trainer.structure.blocks import Block
from finetune_trainer.structure.modules import Part
from finetune_trainer.structure.places import Place, Structure

__all__ = ["Block", "Part", "Place", "Structure"]
