"""Bottleneck adapters: what they are, where they stand, and how a delivered one is put on its base.

Needs torch, safetensors and the model's own library alone::

    from finetune_trainer.adapters import load_adapter

    model = load_adapter(AutoModelForCausalLM.from_pretrained("<base model>"), "<folder>")

A folder holds `adapter_model.safetensors`, everything that has learned under its name in the model, and
`adapter_config.json`: the shape of the bottlenecks (`size`, `activation`), the linear layers that have one (`modules`)
and what of the base is replaced whole (`whole`: norms, a new head).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from finetune_trainer.loaded import lies_in
from finetune_trainer.precision import hold_in_float32

KIND, VERSION = "finetune.dev/bottleneck", 1
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
NAME = "adapter"
"""Under this name the bottleneck lies in the linear layer whose output it changes."""


class Bottleneck(nn.Module):
    """h + up(activation(down(dropout(h)))), which begins as h (Houlsby et al., 2019, arXiv 1902.00751).

    Computes in the precision of its own weights, and gives what it was given.

    Shapes: (..., width) -> (..., width).
    """

    hook: RemovableHandle
    """Lets a linear layer give what this makes of its output."""

    def __init__(self, width: int, size: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, size)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        given = self.dropout(hidden).to(self.down.weight.dtype)
        return hidden + self.up(self.activation(self.down(given))).to(hidden.dtype)


def insert(model: nn.Module, names: Iterable[str], size: int, activation: str, dropout: float = 0.0) -> None:
    """Let a bottleneck in float32 change the output of each of these linear layers, before it is added to anything."""
    for name in names:
        linear = model.get_submodule(name)
        # GPT-2's layers are not torch's and have another word for it.
        width = linear.out_features if isinstance(linear, nn.Linear) else linear.nf
        bottleneck = Bottleneck(width, size, activation, dropout).to(linear.weight.device)
        linear.register_module(NAME, bottleneck)
        bottleneck.hook = linear.register_forward_hook(_change)


def _change(linear: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = linear.get_submodule(NAME)(output)
    return found


def remove(model: nn.Module) -> None:
    """Take all bottlenecks out again."""
    for module in list(model.modules()):
        bottleneck = module._modules.get(NAME)
        if isinstance(bottleneck, Bottleneck):
            bottleneck.hook.remove()
            del module._modules[NAME]


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """The model, changed in place: its base's weights with the adapter that lies in the folder; for inference.

    Raises:
        ValueError: the folder holds something else, or the model is not of the base's shape.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    if (config.get("kind"), config.get("version")) != (KIND, VERSION):
        raise ValueError(f"{folder} holds no bottleneck adapter of version {VERSION}, but {config}")
    spoken = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    insert(model, config["modules"], config["size"], config["activation"])
    for name in config["whole"]:
        hold_in_float32(model.get_submodule(name), spoken)
    changed = (*config["whole"], *(f"{name}.{NAME}" for name in config["modules"]))
    _load(model, load_file(folder / WEIGHTS_FILE), changed)
    model.requires_grad_(False)
    return model.eval()


def _load(model: nn.Module, tensors: dict[str, torch.Tensor], modules: tuple[str, ...]) -> None:
    expected = {name: tensor for name, tensor in model.state_dict().items() if lies_in(name, modules)}
    if tensors.keys() != expected.keys():
        different = sorted(tensors.keys() ^ expected.keys())
        raise ValueError(f"the adapter does not fit the model: {len(different)} tensors differ, such as {different[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the adapter and {tuple(expected[name].shape)} in the model: load "
                "the base with as many outputs (num_labels) as were trained"
            )
    model.load_state_dict(tensors, strict=False)
