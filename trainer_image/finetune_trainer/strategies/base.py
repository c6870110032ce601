"""What every strategy is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from safetensors.torch import load_file

from finetune_api.job import StrategySpec
from finetune_trainer.consolidation import save_shards
from finetune_trainer.verification import ADVICE, VerificationError, differs_from

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer

    from finetune_trainer.loaded import Loaded
    from finetune_trainer.tensors import Numbers

Fetch = Callable[[str, str], Path]
"""Brings the file or model folder at an address here; called with the field that names it, and the address."""

ADAPTER_FILE = "adapter_model.safetensors"
"""The weights of every adapter, whatever made it."""
WHOLE_MODEL = 'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("<this folder>")'


class Strategy(ABC):
    """Which parameters learn. Knows nothing of tasks, so that every sensible pair works."""

    output_kind: ClassVar[Literal["adapter", "model"]]
    library: ClassVar[str]
    """What hubs call the library that loads what is delivered."""
    loading: ClassVar[str]
    """Python code that loads what is delivered; `{loader}` stands for the class of transformers that loads the base,
    `{settings}` for further arguments that it must be given."""

    def __init__(self, spec: StrategySpec) -> None:
        self.spec = spec

    @property
    def virtual_tokens(self) -> int:
        """Tokens that are put before every row and count against the model's positions."""
        return 0

    @abstractmethod
    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        """In which precision the base is held when it is loaded."""

    def quantization(self, compute: torch.dtype) -> BitsAndBytesConfig | None:
        """How the base is quantised when it is loaded; None: not at all."""
        return None

    def gather(self, fetch: Fetch, base: Path) -> None:
        """Bring here what the spec names beside the base; called once, before `prepare`.

        Args:
            base: folder of the base model.
        """

    @abstractmethod
    def prepare(self, base: Loaded) -> PreTrainedModel:
        """The model (or PEFT's around it) with exactly those parameters trainable that may ever learn, in float32.

        Fresh modules always learn. What learns only at times is taken out again by what `attach` adds.

        Raises:
            UsageError: an option of the strategy matches nothing in this architecture.
        """

    @property
    def chooses(self) -> bool:
        """Whether `prepare` chooses by looking at data, which on other hardware might come out otherwise."""
        return False

    def choice(self) -> dict[str, torch.Tensor]:
        """What `prepare` has chosen by looking at data, if it does; kept, since a restart must not choose anew."""
        return {}

    def restore(self, choice: dict[str, torch.Tensor]) -> None:
        """Take an earlier attempt's choice; called before `prepare`."""

    def absent(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """While this lasts, a model that has not been trained yet answers as its base; most begin so anyway."""
        return nullcontext()

    def attach(self, trainer: Trainer) -> None:
        """Add what must happen while training; called once, when the trainer has been built."""

    @abstractmethod
    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        """Write what is delivered as safetensors with its configuration.

        Args:
            model: what prepare returned, trained.
            base_uri: where the base came from; an adapter names it.
            stored: precision in which the base lies in its folder; a whole model is delivered in it.
        """


class ModelStrategy(Strategy):
    """Those that deliver a whole model."""

    output_kind = "model"
    library = "transformers"
    loading = WHOLE_MODEL

    def export(self, model: PreTrainedModel, folder: Path, base_uri: str, stored: torch.dtype) -> None:
        save_model(model, folder, stored)

    def export_shards(
        self, model: PreTrainedModel, folder: Path | None, stored: torch.dtype, between: Callable[[], None]
    ) -> None:
        """Write what `export` writes, of a model in shards; a collective.

        Args:
            folder: None on ranks that only give their shards.
            between: called on every rank before each tensor; may raise, on all ranks alike.
        """
        if folder is not None:
            save_without_weights(model, folder, stored)
        save_shards(model, stored, folder, between)

    def refuse_untrained(self, model: PreTrainedModel, base: Path, delivered: Path) -> None:
        """Raise VerificationError when what was delivered of the model does what its base does.

        Args:
            model: as it was trained; what its parameters are called in files, only the library knows.
            base, delivered: folders of safetensors.
        """
        differs_from(base, delivered)


class AdapterStrategy(Strategy):
    """Those that deliver an adapter, to be put on the base."""

    output_kind = "adapter"

    @abstractmethod
    def apart(self, model: PreTrainedModel) -> PreTrainedModel:
        """The base inside of the model without its adapter; the model is used up."""

    @abstractmethod
    def together(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """A base with the adapter that lies in the folder, as whoever downloads it puts the two together."""

    def refuse_untrained(self, folder: Path) -> None:
        """Raise VerificationError for an adapter that holds nothing, or changes nothing."""
        tensors = load_file(folder / ADAPTER_FILE)
        if not tensors:
            raise VerificationError(f"the adapter in {folder} holds no tensors", ADVICE)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise VerificationError(f"the adapter in {folder} holds numbers that are not finite", ADVICE)
        if not self.changes(tensors):
            raise VerificationError(
                "the adapter changes nothing: its numbers are as they were before training",
                "train for more steps, or with a higher hyperparameters.learningRate",
            )

    @abstractmethod
    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether an adapter with these tensors, by their names in the file, does what it did not before training."""

    def merged(self, adapted: PreTrainedModel, base: Numbers) -> Numbers:
        """The base's numbers with the update in them; only strategies that `output.merge` is allowed for have them.

        Args:
            adapted: what `together` returned; the numbers of the base in it need not be there.
            base: the numbers of the base.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a whole model in shards of safetensors, its floating point weights in dtype; they are cast in place."""
    _cast_saved(model, dtype)
    _set_delivered(model, dtype)
    model.save_pretrained(folder)


def save_without_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write all but the weights of what `save_model` writes; the weights may be written before or after."""
    _set_delivered(model, dtype)
    # Without a single one: the library would gather them all before it writes the first.
    model.save_pretrained(folder, state_dict={})
    # Of which it has concluded a precision.
    model.config.dtype = dtype
    model.config.save_pretrained(folder)


def _set_delivered(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.config.dtype = dtype
    # Turned off for training only; who loads the model wants to generate with it.
    if model.can_generate():
        model.config.use_cache = True


@torch.no_grad()
def _cast_saved(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a file would hold, and not what is computed when a model is built.

    Rotary frequencies, for one, are not saved and always float32: rounded, they would turn the model into another than
    the one that loads from the file.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
