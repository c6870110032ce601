"""Tensors in a folder of safetensors, one at a time."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open

from finetune_trainer.loaded import lies_in

if TYPE_CHECKING:
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


class Numbers(Protocol):
    """Where a model's numbers come from, a few tensors at a time."""

    @property
    def folder(self) -> Path:
        """What they are read from."""

    def __contains__(self, name: str) -> bool:
        """Whether there are numbers for a parameter or buffer, by its name in the model."""

    def take(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Those of these parameters and buffers that there are, on the CPU; fresh copies, or not to be changed."""


class Located:
    """The tensors of a folder, by the parameters of a model that they are loaded into.

    Names in files may be those of an older release of the library, or without the prefix of a headless model; a
    parameter may be made of several tensors.

    Args:
        fresh: modules that the folder does not have, or has in other shapes; their numbers are zero.

    Attributes:
        keys: names of tensors in the files, by the parameter that they make, or the first of several.
        conversions: what the library has to do with the names and tensors of this folder; to be undone when a model
            that was read from it is written.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, fresh: Collection[str] = ()) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.folder, self.index = folder, index(folder)
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self._model = model
        self.keys: defaultdict[str, list[str]] = defaultdict(list)
        self._converters: dict[str, tuple[str, WeightConverter]] = {}
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        for key in sorted(self.index, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            self.keys[key if name not in state and key in state else name].append(key)
            if pattern is not None:
                self._converters[key] = pattern, by_pattern[pattern]
        self.conversions = [entry for entry in mapping if entry.was_used()]
        self._made = {made: name for name in self.keys for made in self._makes(name)}
        self._fresh = {name: tensor.shape for name, tensor in state.items() if lies_in(name, fresh)}

    def __getitem__(self, key: str) -> torch.Tensor:
        return tensor(self.index, key)

    def __contains__(self, name: str) -> bool:
        return name in self._made or name in self._fresh

    def take(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See Numbers; each file's tensor is read once, whatever it makes."""
        found: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(self._made[name] for name in names if name in self._made):
            found |= self._converted(name, {key: self[key] for key in self.keys[name]})
        found |= {name: torch.zeros(self._fresh[name]) for name in names if name in self._fresh}
        return {name: found[name] for name in names if name in found}

    def _makes(self, name: str) -> list[str]:
        """What comes of the tensors under a name in `keys`: that parameter, or several that only the library names."""
        first = self.keys[name][0]
        if first not in self._converters or len(self._converters[first][1].target_patterns) == 1:
            return [name]
        shapes = {key: torch.empty(shape(self.index, key), device="meta") for key in self.keys[name]}
        return list(self._converted(name, shapes))

    def _converted(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first = self.keys[name][0]
        if first not in self._converters:
            return {name: tensors[first]}
        converter = copy.deepcopy(self._converters[first][1])
        for key, found in tensors.items():
            converter.add_tensor(name, key, self._converters[key][0], found)
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {target: found[0] if isinstance(found, list) else found for target, found in made.items()}
