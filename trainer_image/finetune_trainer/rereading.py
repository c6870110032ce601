"""A model that answers from its files: only what lies outside of the blocks is held, and the block at work.

Models that are trained in shards, or on a quantised base, may fit into no single machine whole; they answer for the
proof all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from finetune_trainer.errors import TrainerError
from finetune_trainer.loaded import Loaded
from finetune_trainer.structure import Structure
from finetune_trainer.tensors import Located

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.model import Source
    from finetune_trainer.tasks import Task
    from finetune_trainer.tensors import Numbers


class Rereading:
    """Gives a model that has shapes alone its numbers for the time in which it needs them.

    An adapter may be put on the model afterwards: numbers are given to the modules that it has now, wherever an adapter
    moves them, and what learns then has its numbers from elsewhere and keeps them.

    Args:
        model: is changed in place.
        numbers: called for again in every pass.
        dtype: in which floating point weights are held.
        device: where the model answers.
        alive: called before each block; may raise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        numbers: Numbers,
        dtype: torch.dtype,
        device: torch.device,
        alive: Callable[[], None],
    ) -> None:
        self._numbers, self._dtype, self._device, self._alive = numbers, dtype, device, alive
        self._work_out_buffers(model)
        self._places = {name: _place(model, name) for name in model.state_dict()}
        blocks = Structure.of(model).blocks
        prefixes = tuple(f"{block.name}." for block in blocks)
        self._outside = [name for name in self._places if not name.startswith(prefixes)]
        self._fill_outside(model)
        self._at_work: list[str] = []
        for block, prefix in zip(blocks, prefixes, strict=True):
            names = [name for name in self._places if name.startswith(prefix) and self._tensor(name).is_meta]
            self._empty(names)
            block.module.register_forward_pre_hook(self._begin(names))

    def let_go(self) -> None:
        """Hold no numbers any more; the model cannot answer again."""
        self._empty([*self._outside, *self._at_work])
        self._at_work = []

    def _work_out_buffers(self, model: PreTrainedModel) -> None:
        """What no file holds, such as rotary frequencies, by the library's own means; in which it marks what is."""
        for name, buffer in list(model.named_non_persistent_buffers()):
            _set(*_place(model, name), torch.zeros_like(buffer, device="cpu"))
        for name in model.state_dict():
            model.get_parameter_or_buffer(name)._is_hf_initialized = True
        model.initialize_weights()
        for name, buffer in list(model.named_non_persistent_buffers()):
            _set(*_place(model, name), buffer.to(self._device))

    def _fill_outside(self, model: PreTrainedModel) -> None:
        self._fill(self._outside)
        # As the library does when it loads: of two that are one the files may hold either, or both.
        lacking = {name for name in self._places if name not in self._numbers}
        model.tie_weights(missing_keys=lacking, recompute_mapping=False)
        self._refuse([name for name in self._outside if self._tensor(name).is_meta])

    def _begin(self, names: list[str]) -> Callable[..., None]:
        def begin(*_: object) -> None:
            self._alive()
            if self._at_work != names:
                # Not at its own end: what an adapter puts around a block of one layer may look at it afterwards.
                self._empty(self._at_work)
                self._at_work = [name for name in names if not self._tensor(name).requires_grad]
                self._refuse([name for name in self._at_work if name not in self._numbers])
                self._fill(self._at_work)

        return begin

    def _refuse(self, lacking: list[str]) -> None:
        if lacking:
            count = f"({len(lacking)} are missing)"
            raise TrainerError(f"{self._numbers.folder} has no weights for {min(lacking)} {count}")

    def _fill(self, names: Iterable[str]) -> None:
        for _, module in groupby(names, lambda name: name.rpartition(".")[0]):
            for name, tensor in self._numbers.take(list(module)).items():
                if tensor.shape != (expected := self._tensor(name).shape):
                    raise TrainerError(
                        f"{self._numbers.folder} has {name} in shape {tuple(tensor.shape)}, where the architecture has "
                        f"{tuple(expected)}"
                    )
                _set(*self._places[name], tensor.to(self._device, self._held(name)))

    def _empty(self, names: Iterable[str]) -> None:
        """One number in the shape of many: some models ask their first parameter where inputs belong."""
        for name in names:
            number = torch.zeros((), dtype=self._held(name), device=self._device)
            _set(*self._places[name], number.expand(self._tensor(name).shape))

    def _tensor(self, name: str) -> torch.Tensor:
        module, own = self._places[name]
        found = module._buffers[own] if own in module._buffers else module._parameters[own]
        assert found is not None, "the state names no other"
        return found

    def _held(self, name: str) -> torch.dtype:
        tensor = self._tensor(name)
        return self._dtype if tensor.is_floating_point() else tensor.dtype


def reread(task: Task, alive: Callable[[], None], source: Source) -> Loaded:
    """What `task.load` gives, once it has loaded that base, of which only what lies outside of the blocks is held."""
    # As the library does that loads it.
    source.config.dtype = source.dtype
    model = task.skeleton(source).model
    if model.can_generate() and (source.folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    numbers = Located(model, source.folder, task.fresh)
    Rereading(model, numbers, source.dtype, torch.device("cpu"), alive)
    return Loaded(model, task.fresh, task.peft_task, examples=task.examples, encode=task.encode)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _set(module: nn.Module, own: str, tensor: torch.Tensor) -> None:
    if own in module._buffers:
        module._buffers[own] = tensor
    else:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
