"""Tensors in a folder of safetensors, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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


class Located:
    """The tensors of a folder, by the parameters of a model that they are loaded into."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.folder, self.index = folder, index(folder)
        # Names in files may be those of an older release of the library, or without the prefix of a headless model.
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self.keys: defaultdict[str, list[str]] = defaultdict(list)
        for key in sorted(self.index, key=dot_natural_key):
            name, _ = rename_source_key(key, renamings, converters, prefix, state)
            self.keys[key if name not in state and key in state else name].append(key)

    def __getitem__(self, key: str) -> torch.Tensor:
        return tensor(self.index, key)
