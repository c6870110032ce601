"""Adapter: small networks inside of every block of a frozen base, delivered alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from finetune_api.selection import ModelPart, ModuleKind
from finetune_api.strategy import BottleneckOptions, BottleneckPlacement
from finetune_trainer import adapters
from finetune_trainer.errors import UsageError
from finetune_trainer.gathering import trainable_state
from finetune_trainer.precision import hold_in_float32
from finetune_trainer.selection import chosen
from finetune_trainer.strategies.base import AdapterStrategy
from finetune_trainer.strategies.targets import convolution_names
from finetune_trainer.structure import Block, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Loaded

FIELD = "spec.strategy.adapter"


class Adapter(AdapterStrategy):
    """Bottlenecks after attention and feed-forward (Houlsby et al., 2019) or after the latter (Pfeiffer et al., 2021).

    Beside them learn the norms of the same blocks, unless layerNorms is false, and what is fresh. The norms outside of
    the blocks belong to no adapter and stay as they are.
    """

    library = "finetune-operator"
    # transformers first: the other import tells the hub's client to stay offline.
    loading = (
        "from transformers import {loader}\nfrom finetune_trainer.adapters import load_adapter\n\n"
        'base = {loader}.from_pretrained("<base model>"{settings})\n'
        'model = load_adapter(base, "<this folder>")'
    )
    _originals: dict[str, nn.Module]
    """What learns whole, as it was."""
    _modules: list[str]
    """Linear layers with a bottleneck."""

    @property
    def options(self) -> BottleneckOptions:
        assert self.spec.adapter is not None, "a resolved job has its options"
        return self.spec.adapter

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        return compute

    def prepare(self, base: Loaded) -> PreTrainedModel:
        model, options = base.model, self.options
        structure = Structure.of(model)
        blocks = self._blocks(structure)
        self._modules = [name for block in blocks for name in places(block, options.placement, model)]
        norms = norms_of(structure, blocks) if options.layer_norms else []
        self._originals = {name: copy.deepcopy(model.get_submodule(name)) for name in [*norms, *base.fresh]}
        model.requires_grad_(False)
        spoken = model.dtype
        for name in self._originals:
            hold_in_float32(model.get_submodule(name).requires_grad_(True), spoken)
        adapters.insert(model, self._modules, options.size, options.activation.value, options.dropout)
        return model

    def _blocks(self, structure: Structure) -> list[Block]:
        if not structure.blocks:
            raise UsageError(
                f"spec.strategy.type: Adapter stands in blocks, and {type(structure.model).__name__} has none",
                _instead(structure.model),
            )
        if self.options.layers is None:
            return list(structure.blocks)
        names = chosen(structure, ModelPart(layers=self.options.layers), FIELD)
        numbers = {structure.places[name].layer for name in names}
        return [block for block in structure.blocks if block.layer in numbers]

    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = trainable_state(model, learning)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in state.items()},
            folder / adapters.WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        config = {
            "kind": adapters.KIND,
            "version": adapters.VERSION,
            "base_model": base_uri,
            "placement": self.options.placement.value,
            "size": self.options.size,
            "activation": self.options.activation.value,
            "modules": self._modules,
            "whole": list(self._originals),
        }
        (folder / adapters.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def apart(self, model: PreTrainedModel) -> PreTrainedModel:
        adapters.remove(model)
        for name, original in self._originals.items():
            model.set_submodule(name, original)
        return model

    def together(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
        adapters.load_adapter(base, folder)
        return base

    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        return any(tensor.norm() > 0 for name, tensor in tensors.items() if name.endswith(f"{adapters.NAME}.up.weight"))


def places(block: Block, placement: BottleneckPlacement, model: nn.Module) -> list[str]:
    """Names of the linear layers of a block that get a bottleneck; raises UsageError where they cannot be told."""
    attention, feed_forward = block.attention_output, block.feed_forward_output
    if feed_forward is None or (attention is None and placement is BottleneckPlacement.HOULSBY):
        missing = "feed-forward" if feed_forward is None else "attention"
        raise UsageError(
            f"spec.strategy.type: Adapter changes what the last linear layer of attention and feed-forward gives, and "
            f"the blocks of {type(model).__name__} ({type(block.module).__name__}) have none in their {missing}",
            _instead(model),
        )
    outputs = [attention, feed_forward] if placement is BottleneckPlacement.HOULSBY else [feed_forward]
    return [output.name for output in outputs if output is not None]


def _instead(model: nn.Module) -> str:
    convolutions = ", ".join(convolution_names(model))
    targets = f" with lora.targetModules [{convolutions}]" if convolutions else ""
    return f"use strategy Partial, or LoRA{targets}"


def norms_of(structure: Structure, blocks: list[Block]) -> list[str]:
    """Names of the norms that lie in these blocks, in the order of the model."""
    layers = {block.layer for block in blocks}
    found = [
        name.rpartition(".")[0]
        for name, place in structure.places.items()
        if place.kind is ModuleKind.LAYER_NORM and place.layer in layers
    ]
    return list(dict.fromkeys(found))
