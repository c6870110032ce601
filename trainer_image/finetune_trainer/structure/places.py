"""The place of every parameter: its block, its kind, and how deep in the model it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from finetune_api.selection import ModuleKind
from finetune_trainer.structure.blocks import Block, find_blocks
from finetune_trainer.structure.modules import (
    CONTAINERS,
    is_batch_norm,
    is_convolution,
    is_layer_norm,
    is_linear,
    is_simple,
    unwrapped,
)


@dataclass(frozen=True)
class Place:
    """Where a parameter lies.

    Attributes:
        layer: number of its block; None outside of the blocks.
        kind: what it is part of; None for what is none of the kinds: convolutions, batch norms, layer scales.
        depth: 0 before the blocks (embedding, stem), layer + 1 in them, the number of blocks + 1 after them (final
            norm, pooler, head).
    """

    layer: int | None
    kind: ModuleKind | None
    depth: int


@dataclass(frozen=True)
class Structure:
    """A model, seen as blocks with something before and something after them.

    Attributes:
        places: of every parameter, by its name in model.named_parameters(), in that order. What PEFT puts into a module
            has that module's place; virtual tokens have no layer and no kind.
        blocks: in the order of the forward pass.
    """

    model: nn.Module
    places: Mapping[str, Place]
    blocks: Sequence[Block]

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @cached_property
    def kinds(self) -> set[ModuleKind]:
        """Those that some parameter has."""
        return {place.kind for place in self.places.values() if place.kind is not None}

    @cached_property
    def norms(self) -> list[str]:
        """Class names of all norms, batch norms included."""
        modules = [module for module in self.model.modules() if is_layer_norm(module) or is_batch_norm(module)]
        return sorted({type(unwrapped(module)).__name__ for module in modules})

    @property
    def shares_embedding(self) -> bool:
        """Whether the output head's weights are the embedding's."""
        linear = (module for module in self.model.modules() if is_linear(module))
        return not _embedded(self.model).isdisjoint(id(unwrapped(module).weight) for module in linear)

    def example(self, kind: ModuleKind) -> str:
        """Name of a module of a kind that the model has."""
        name = next(name for name, place in self.places.items() if place.kind is kind)
        return name.rpartition(".")[0]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """The structure of a model, also one on the meta device, quantised, or inside of a PeftModel.

        Outside of the blocks: every norm is LayerNorm. Embedding is what turns the input into features: embeddings,
        learned tokens and positions, patch embeddings (convolutions that step by their own size) and linear layers
        before the blocks. Head is what lies after the blocks: output head, classifier, pooler, VGG's fully connected
        layers. A head that shares the embedding's weights is Embedding, since what is trained there is trained here.
        """
        blocks = find_blocks(model)
        walk = _Walk(model, blocks)
        places = {name: walk.place(name) for name, _ in model.named_parameters()}
        return cls(model, places, blocks)


class _Walk:
    """Everything that the places of a model's parameters depend on."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.modules = dict(model.named_modules())
        self.order = {name: number for number, name in enumerate(self.modules)}
        self.layers = {block.name: block.layer for block in blocks}
        self.parts = {part.name: ModuleKind.ATTENTION for block in blocks for part in block.attention}
        self.parts |= {part.name: ModuleKind.FEED_FORWARD for block in blocks for part in block.feed_forward}
        self.after = len(blocks) + 1
        self.start = self.order[blocks[0].name] if blocks else len(self.order)
        self.end = self._end_of(blocks[-1].name) if blocks else 0
        # PEFT keeps virtual tokens beside the model, and everything else inside of it.
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.base = {id(module) for module in base.modules()}
        self.embedded = _embedded(base)

    def _end_of(self, block: str) -> int:
        """Position of the last module of a block; of its list, where it is one of a list's members."""
        parent = block.rpartition(".")[0]
        whole = parent if isinstance(self.modules[parent], CONTAINERS) else block
        return max(number for name, number in self.order.items() if f"{name}.".startswith(f"{whole}."))

    def place(self, name: str) -> Place:
        """The place of a parameter."""
        path, _, own = name.rpartition(".")
        if id(self.modules[path]) not in self.base:
            return Place(None, None, self.after)
        enclosing = [path, *_enclosing(path)]
        norm = ModuleKind.LAYER_NORM if any(is_layer_norm(self.modules[outer]) for outer in enclosing) else None
        layer = next((self.layers[outer] for outer in enclosing if outer in self.layers), None)
        if layer is not None:
            kind = next((self.parts[outer] for outer in enclosing if outer in self.parts), None)
            return Place(layer, norm or kind, layer + 1)
        if self.start <= self.order[path] <= self.end:
            # Between blocks, such as a norm of VGG or the step down between two stages: it goes with the block before.
            layer = max(number for block, number in self.layers.items() if self.order[block] < self.order[path])
            return Place(layer, norm, layer + 1)
        return self._outside(enclosing, self.modules[path]._parameters[own], norm)

    def _outside(self, enclosing: list[str], parameter: nn.Parameter | None, norm: ModuleKind | None) -> Place:
        if id(parameter) in self.embedded:
            return Place(None, ModuleKind.EMBEDDING, 0)
        if norm:
            return Place(None, norm, self._side_of_norm(enclosing[0]))
        layer = next((self.modules[outer] for outer in reversed(enclosing) if is_simple(self.modules[outer])), None)
        if layer is not None and is_batch_norm(layer):
            return Place(None, None, self._side(enclosing[0]))
        if self._side(enclosing[0]):
            return Place(None, ModuleKind.HEAD, self.after)
        return Place(None, ModuleKind.EMBEDDING if _embeds(layer, parameter) else None, 0)

    def _side(self, path: str) -> int:
        return 0 if self.order[path] < self.start else self.after

    def _side_of_norm(self, path: str) -> int:
        """Names decide where a module's order of registration is not that of use: OPT's final norm, BART's first."""
        if "emb" in path.lower():
            return 0
        return self.after if path.rpartition(".")[2].startswith("final") else self._side(path)


def _embedded(model: nn.Module) -> set[int]:
    """Identities of the parameters of all embeddings."""
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(parameter) for table in tables for parameter in table.parameters()}


def _enclosing(path: str) -> list[str]:
    """Names of the modules around a module, from the inside out, the model itself included."""
    steps = path.split(".") if path else []
    return [".".join(steps[:length]) for length in reversed(range(len(steps)))]


def _embeds(layer: nn.Module | None, parameter: nn.Parameter | None) -> bool:
    if layer is None:
        # A parameter of the model itself: a table of positions or a learned token, but not a scale.
        return parameter is not None and parameter.ndim > 1
    inner: Any = unwrapped(layer)
    if is_convolution(inner):
        return bool(inner.kernel_size == inner.stride and max(inner.stride) > 1)
    return is_linear(inner) or isinstance(inner, nn.Embedding)
