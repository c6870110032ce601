"""A delivered model that answers from its files: only what lies outside of the blocks is held, and the block at work.

Models that are trained in shards may fit into no single machine whole; they answer for the proof all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune_trainer.errors import TrainerError
from finetune_trainer.structure import Structure
from finetune_trainer.tensors import Located

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rereading:
    """Gives a model that has shapes alone its numbers from a folder, for the time in which it needs them.

    Args:
        model: from the configuration in the folder; is changed in place.
        dtype: in which floating point weights are held.
        device: where the model answers.
        alive: called before each block; may raise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        alive: Callable[[], None],
    ) -> None:
        self._model, self._dtype, self._device, self._alive = model, dtype, device, alive
        self._located = Located(model, folder)
        self._work_out_buffers()
        blocks = Structure.of(model).blocks
        prefixes = tuple(f"{block.name}." for block in blocks)
        self._fill(name for name in self._located.keys if not name.startswith(prefixes))
        model.tie_weights()
        self._refuse_lacking(name for name, tensor in _named(model) if not name.startswith(prefixes) and tensor.is_meta)
        for block, prefix in zip(blocks, prefixes, strict=True):
            self._fill_while_at_work(block.module, prefix)

    def _work_out_buffers(self) -> None:
        """What no file holds, such as rotary frequencies, by the library's own means; in which it marks what is."""
        for name, buffer in list(self._model.named_non_persistent_buffers()):
            _set(self._model, name, torch.zeros_like(buffer, device="cpu"))
        for name in self._model.state_dict():
            self._model.get_parameter_or_buffer(name)._is_hf_initialized = True
        self._model.initialize_weights()
        for name, buffer in list(self._model.named_non_persistent_buffers()):
            _set(self._model, name, buffer.to(self._device))

    def _fill(self, keys: Iterable[str]) -> None:
        for key in keys:
            for name, tensor in self._located.parameters(self._model, key).items():
                _set(self._model, name, tensor.to(self._device, self._dtype if tensor.is_floating_point() else None))

    def _refuse_lacking(self, names: Iterable[str]) -> None:
        if lacking := sorted(names):
            raise TrainerError(f"{self._located.folder} has no weights for {lacking[0]} ({len(lacking)} are missing)")

    def _fill_while_at_work(self, block: nn.Module, prefix: str) -> None:
        keys = [key for key in self._located.keys if key.startswith(prefix)]
        empty = {name: self._placeholder(tensor) for name, tensor in _named(block) if tensor.is_meta}

        def begin(*_: object) -> None:
            self._alive()
            self._fill(keys)
            self._refuse_lacking(prefix + name for name, tensor in _named(block) if tensor is empty.get(name))

        def end(*_: object) -> None:
            for name, tensor in empty.items():
                _set(block, name, tensor)

        end()
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)

    def _placeholder(self, tensor: torch.Tensor) -> torch.Tensor:
        """One number in the shape of many: some models ask their first parameter where inputs belong."""
        number = torch.empty((), dtype=self._dtype if tensor.is_floating_point() else tensor.dtype, device=self._device)
        shape = number.expand(tensor.shape)
        return nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._buffers:
        module._buffers[own] = tensor
    else:
        module._parameters[own] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
