"""Which part of a model is quantised."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from finetune_trainer.heads import skeleton
from finetune_trainer.structure import Part, Structure
from finetune_trainer.structure.modules import linears

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

    from finetune_trainer.model import Source


def store_as(quantization: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Have 4-bit weights held as numbers of a floating point type: shards can be made of these alone.

    Args:
        dtype: that of the pass, so that nothing casts the bits on their way through the gathering of shards.
    """
    quantization.bnb_4bit_quant_storage = dtype


def only_blocks(source: Source, loader: str) -> BitsAndBytesConfig | None:
    """The source's quantisation with all linear layers outside of the blocks left whole; None where it has none.

    The library itself leaves the output embedding, but no classifier that has a bias. What is new to a model is drawn
    at random and must learn with all its digits, and it lies there; what else does (poolers, projections) is small.

    Args:
        loader: name of the class in transformers that loads the model.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    if source.quantization is None:
        return None
    model = skeleton(source, loader)
    blocks = tuple(f"{block.name}." for block in Structure.of(model).blocks)
    outside = {part.name for part in linears(Part("", model)) if not part.name.startswith(blocks)}
    quantization = copy.deepcopy(source.quantization)
    quantization.llm_int8_skip_modules = sorted(outside | set(get_keys_to_not_convert(model)))
    return quantization
