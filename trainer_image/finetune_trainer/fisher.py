"""Which single weights matter most to the data, and training no others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from finetune_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Rows


def fisher_information(
    model: PreTrainedModel, names: set[str], rows: Rows, compute: torch.dtype
) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information of some parameters, each in its parameter's shape, in float32.

    F_i = 1/N sum_n (d log p(y_n|x_n) / d w_i)^2 (Kunstner et al., 2019, arXiv 1905.12558), with the loss that the model
    itself gives as -log p. For text that is the mean over a row's tokens, so that long rows do not outweigh short ones;
    for a regression it is the squared error, which is -log p up to a factor.

    The model comes back as it was, but that exactly `names` require gradients.

    Args:
        rows: batches of one: a square of sums is no sum of squares.
        compute: bfloat16 for a pass under autocast; otherwise the pass runs as the model is held, since in float16
            small gradients would be lost.

    Raises:
        DataError: a row gives no finite gradient.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    training = model.training
    model.eval()
    count = 0
    for row in rows:
        gradients = _gradients(model, list(parameters.values()), row, compute)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient.float(), gradient.float())
        count += 1
    model.train(training)
    if not all(torch.isfinite(information).all() for information in sums.values()):
        raise DataError(
            "spec.strategy.select.fisher: a training row gives gradients that are not finite",
            "look for rows with extreme values or without anything to learn, or set model.dtype to float32",
        )
    return {name: information / max(count, 1) for name, information in sums.items()}


def _gradients(
    model: PreTrainedModel, parameters: list[nn.Parameter], row: Mapping[str, torch.Tensor], compute: torch.dtype
) -> tuple[torch.Tensor | None, ...]:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in row.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute is torch.bfloat16):
        loss = model(**inputs).loss
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def largest(information: Mapping[str, torch.Tensor], fraction: float) -> dict[str, torch.Tensor]:
    """Masks of the elements with the largest values, a share of all elements of all tensors together.

    At least one element is kept. Of equal values those that come first are: the same ones every time.
    """
    values = torch.cat([tensor.flatten() for tensor in information.values()])
    count = max(1, math.floor(fraction * values.numel() + 0.5))
    threshold = values.kthvalue(values.numel() - count + 1).values
    kept = values > threshold
    equal = (values == threshold).nonzero().flatten()
    kept[equal[: count - int(kept.sum())]] = True
    parts = kept.split([tensor.numel() for tensor in information.values()])
    return {name: part.view_as(information[name]) for (name, part) in zip(information, parts, strict=True)}


class Elements:
    """A parameter of which only some elements learn; the others stay as they are, bit by bit."""

    def __init__(self, parameter: nn.Parameter, kept: torch.Tensor) -> None:
        """Args: kept: of the parameter's shape, true where it learns."""
        self._parameter, self._kept = parameter, kept
        self._rest = parameter.detach().clone()
        # For whoever counts what learns.
        parameter.learning_elements = int(kept.sum())  # type: ignore[attr-defined]
        parameter.register_hook(self._mask)

    def _mask(self, gradient: torch.Tensor) -> torch.Tensor:
        """Called in every backward pass, before gradients are added up, exchanged between ranks, and clipped: the norm
        is that of what learns, and the others' moments stay zero."""
        self._follow(gradient.device)
        # A product would make NaN of an infinite gradient.
        return gradient.where(self._kept, torch.zeros_like(gradient))

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what an optimizer does without a gradient: weight decay, and the rounding of moments to 8 bits."""
        self._follow(self._parameter.device)
        self._parameter.copy_(self._parameter.where(self._kept, self._rest))

    def _follow(self, device: torch.device) -> None:
        # The model moves to a GPU after it was prepared.
        self._kept, self._rest = self._kept.to(device), self._rest.to(device)


class PutBackCallback(TrainerCallback):
    """Puts back, after every step of the optimizer, what does not learn."""

    def __init__(self, elements: list[Elements]) -> None:
        self._elements = elements

    def on_optimizer_step(self, *arguments: Any, **named: Any) -> None:
        for elements in self._elements:
            elements.put_back()


def packed(kept: torch.Tensor) -> torch.Tensor:
    """A mask as bits, eight in a byte; one dimension."""
    bits = kept.flatten().cpu()
    bits = nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mask again."""
    spread = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return spread.flatten()[: shape.numel()].view(shape).bool()
