"""What a task hands to a strategy: a model with the output that the task needs, and nothing of the task itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Iterable[dict[str, torch.Tensor]]


def no_examples(count: int) -> Rows:
    """For models that are looked at without data."""
    raise ValueError(f"{count} rows were asked for where there are none")


@dataclass(frozen=True)
class Loaded:
    """A base model, ready to be prepared by a strategy.

    Attributes:
        model: every parameter as it was loaded.
        fresh: names of the modules that the base did not have, such as a classifier's new head: random until they are
            trained, so they learn under every strategy and are part of whatever is delivered.
        peft_task: PEFT's word for models with such an output (CAUSAL_LM, SEQ_CLS); None where it has none.
        examples: gives so many training rows, each a batch of one as the model takes it, labels included; the same
            ones every time. On the CPU.
        compute: precision of the forward and backward pass, under autocast where it is not float32.
        device: where the model is going to be trained.
        encode: gives the token ids of a text, without special ones; None where the input is no text.
    """

    model: PreTrainedModel
    fresh: tuple[str, ...] = ()
    peft_task: str | None = None
    examples: Callable[[int], Rows] = no_examples
    compute: torch.dtype = torch.float32
    device: str = "cpu"
    encode: Callable[[str], list[int]] | None = None

    @property
    def weightless(self) -> bool:
        """Whether the model has shapes alone (the meta device): it can be looked at, but not run."""
        return is_weightless(self.model)

    def is_fresh(self, parameter: str) -> bool:
        """Whether a parameter, by its name in the model, belongs to a fresh module."""
        return lies_in(parameter, self.fresh)


def is_weightless(model: PreTrainedModel) -> bool:
    """Whether a model has shapes alone, but for what is new to it; it is looked at, or gets its numbers later."""
    return any(parameter.is_meta for parameter in model.parameters())


def lies_in(parameter: str, modules: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of the modules, by their names in the model."""
    return any(parameter == name or parameter.startswith(name + ".") for name in modules)
