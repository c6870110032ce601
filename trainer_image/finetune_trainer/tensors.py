"""Tensors in a folder of safetensors, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    import torch


def index(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by the tensor's name there."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def tensor(index: Mapping[str, Path], name: str) -> torch.Tensor:
    """One tensor, on the CPU."""
    with safe_open(index[name], framework="pt") as file:
        return file.get_tensor(name)


def shape(index: Mapping[str, Path], name: str) -> tuple[int, ...]:
    """A tensor's shape, without reading it."""
    with safe_open(index[name], framework="pt") as file:
        return tuple(file.get_slice(name).get_shape())
