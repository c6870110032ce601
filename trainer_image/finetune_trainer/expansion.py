"""More blocks for a model that is there: copies of its own that begin as the identity (LLaMA Pro, arXiv 2401.02415)."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from finetune_api.strategy import BlockPlacement
from finetune_trainer.structure import Block, Structure

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class NotExpandableError(ValueError):
    """The architecture cannot take more blocks; says why."""


class Expanded(NamedTuple):
    """A larger model, and the names of its new blocks and of the linear layers in them that were set to zero."""

    model: PreTrainedModel
    blocks: list[str]
    zeroed: list[str]


def sources(count: int, blocks: int, placement: BlockPlacement) -> list[int]:
    """For every block of the larger model the number of the block that it was, or is a copy of, in order.

    A copy stands after its source: the last block (Last), or the last one of each of `blocks` groups of equal size, as
    nearly as that goes (Interleaved).

    Args:
        count: blocks that there are.
        blocks: how many are added.
    """
    if placement is BlockPlacement.LAST:
        return [*range(count), *[count - 1] * blocks]
    # Rounded up, so that the last copy stands after the last block.
    ends = [-(-(number + 1) * count // blocks) for number in range(blocks)]
    return sorted([*range(count), *(end - 1 for end in ends)])


def expand(model: PreTrainedModel, blocks: int, placement: BlockPlacement) -> Expanded:
    """A model with more blocks; it shares all tensors of the old one.

    The library builds it from a configuration with more blocks, so that it is what whoever downloads it will load: also
    what depends on a block's number (caches, windows, scales) is right, or the answers differ from the start.

    Raises:
        NotExpandableError: no such configuration makes a model that these tensors fit into.
    """
    found = Structure.of(model).blocks
    stack, zeroed = _stack(model, found), _output_projections(found)
    order = sources(len(found), blocks, placement)
    larger = _built(model, order)
    _fill(larger, model, stack, order)
    new = [f"{stack}.{place}" for place in range(len(order)) if _is_new(order, place)]
    projections = [f"{block}.{projection}" for block in new for projection in zeroed]
    for name in projections:
        for parameter in larger.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return Expanded(larger, new, projections)


def _stack(model: PreTrainedModel, blocks: list[Block]) -> str:
    """Name of the list that holds the blocks."""
    stacks = {block.name.rpartition(".")[0] for block in blocks}
    counted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if len(stacks) != 1 or counted != len(blocks):
        raise NotExpandableError(
            f"{type(model).__name__} is not one row of blocks that its configuration counts in num_hidden_layers"
        )
    return stacks.pop()


def _output_projections(blocks: list[Block]) -> list[str]:
    """Names, within a block, of what adds to the residual stream."""
    block = blocks[0]
    outputs = [block.attention_output, block.feed_forward_output]
    if any(output is None for output in outputs):
        raise NotExpandableError(
            f"the blocks of the model ({type(block.module).__name__}) have no single last layer of their attention and "
            "of their feed-forward, which could be set to zero"
        )
    return [output.name.removeprefix(f"{block.name}.") for output in outputs if output is not None]


def _built(model: PreTrainedModel, order: list[int]) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    try:
        _recount(config.get_text_config(), order)
        with torch.device("meta"):
            larger = type(model)(config)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise NotExpandableError(f"{type(model).__name__} cannot be built with {len(order)} blocks: {error}") from error
    if model.can_generate():
        larger.generation_config = model.generation_config
    return larger.train(model.training)


def _recount(config: PretrainedConfig, order: list[int]) -> None:
    """Set the number of blocks, and take for each of them what lists of the configuration say of its source."""
    count = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, [value[source] for source in order])
    config.num_hidden_layers = len(order)


def _fill(larger: nn.Module, model: nn.Module, stack: str, order: list[int]) -> None:
    """Give a model without tensors those of the smaller one, the same objects; new blocks get copies."""
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    numbered = re.compile(rf"^{re.escape(stack)}\.(\d+)\.")
    for path, module in larger.named_modules():
        for kind in (module._parameters, module._buffers):
            for own, empty in kind.items():
                if empty is None:
                    continue
                name = f"{path}.{own}" if path else own
                place = int(found[1]) if (found := numbered.match(name)) else 0
                source = numbered.sub(f"{stack}.{order[place]}.", name)
                if source not in known or known[source].shape != empty.shape:
                    raise NotExpandableError(f"{name} of the larger model is nothing that the model has")
                kind[own] = copy.deepcopy(known[source]) if _is_new(order, place) else known[source]


def _is_new(order: list[int], place: int) -> bool:
    return place > 0 and order[place] == order[place - 1]
