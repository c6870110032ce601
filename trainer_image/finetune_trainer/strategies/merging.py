"""A base's numbers with those of an adapter of PEFT merged into them, a layer at a time."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune_trainer.loaded import lies_in
from finetune_trainer.structure.modules import unwrapped

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from finetune_trainer.tensors import Numbers


class Merged:
    """Numbers of the model that PEFT's merge_and_unload would give of a base in float32, without ever holding it.

    Args:
        adapted: of its base only the modules are looked at, never the numbers.
        base: the base's numbers, in any precision.
        whole: by their names the modules that the adapter has trained whole.
    """

    def __init__(self, adapted: PeftModel, base: Numbers, whole: dict[str, nn.Module]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._base, self._whole = base, whole
        named = adapted.get_base_model().named_modules()
        self._layers = {name: module for name, module in named if isinstance(module, BaseTunerLayer)}

    @property
    def folder(self) -> Path:
        return self._base.folder

    def __contains__(self, name: str) -> bool:
        return name in self._base or lies_in(name, self._whole)

    def take(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See Numbers; what an adapter changes is in float32."""
        found: dict[str, torch.Tensor] = {}
        for path, members in groupby(names, lambda name: name.rpartition(".")[0]):
            found |= self._of_module(path, list(members))
        return found

    def _of_module(self, path: str, names: list[str]) -> dict[str, torch.Tensor]:
        for name, module in self._whole.items():
            if lies_in(path, (name,)):
                inside = module.get_submodule(path.removeprefix(name).removeprefix("."))
                return {name: getattr(inside, name.rpartition(".")[2]).detach() for name in names}
        if path not in self._layers:
            return self._base.take(names)
        merged = self._merged(path, self._layers[path])
        return {name: merged[name] for name in names}

    def _merged(self, path: str, layer: BaseTunerLayer) -> dict[str, torch.Tensor]:
        inner = unwrapped(layer)
        before = dict(inner._parameters)
        own = {f"{path}.{name}": name for name, parameter in before.items() if parameter is not None}
        for full, tensor in self._base.take(list(own)).items():
            # A copy: PEFT adds to it in place.
            inner._parameters[own[full]] = nn.Parameter(tensor.to(torch.float32, copy=True), requires_grad=False)
        try:
            layer.merge()
            return {full: inner.get_parameter(name).detach() for full, name in own.items()}
        finally:
            layer.merged_adapters.clear()
            inner._parameters.update(before)
