"""Tensors in a folder of safetensors, one at a time."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


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
    """The tensors of a folder, by the parameters of a model that they are loaded into.

    Names in files may be those of an older release of the library, or without the prefix of a headless model; a
    parameter may be made of several tensors.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.folder, self.index = folder, index(folder)
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self.keys: defaultdict[str, list[str]] = defaultdict(list)
        self._converters: dict[str, tuple[str, WeightConverter]] = {}
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        for key in sorted(self.index, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            self.keys[key if name not in state and key in state else name].append(key)
            if pattern is not None:
                self._converters[key] = pattern, by_pattern[pattern]

    def __getitem__(self, key: str) -> torch.Tensor:
        return tensor(self.index, key)

    def parameters(self, model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
        """What the library makes of the tensors under a name in `keys`: one parameter or buffer, or several."""
        keys = self.keys[name]
        if keys[0] not in self._converters:
            return {name: self[keys[0]]}
        converter = copy.deepcopy(self._converters[keys[0]][1])
        for key in keys:
            converter.add_tensor(name, key, self._converters[key][0], self[key])
        made = converter.convert(name, model=model, config=model.config)
        return {target: found[0] if isinstance(found, list) else found for target, found in made.items()}
