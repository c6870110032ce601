"""Proof that what lies in the bucket is what was trained: not empty, not the base, loads, and answers the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_trainer import tensors
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.strategies.base import AdapterStrategy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of two logits, as a share of the largest logit, by the lowest precision that had a part in them:
kernels may add in another order, no more."""
TRAIN_MORE = (
    "train for more steps or with a higher hyperparameters.learningRate: smaller changes vanish in the precision that "
    "the base is stored in"
)
ADVICE = "this is an error of the trainer or of the storage, not of the spec; the last checkpoint is complete"


class VerificationError(TrainerError):
    """What was delivered is not what was trained."""


Probe = Mapping[str, torch.Tensor]
"""Inputs of a few rows, as the model takes them by name."""


@torch.no_grad()
def logits(model: PreTrainedModel, probe: Probe) -> torch.Tensor:
    """The model's answer, on the CPU."""
    training = model.training
    model.eval()
    try:
        # A cache would only be thrown away; models that generate nothing do not know the word.
        settings = {"use_cache": False} if model.can_generate() else {}
        return model(**probe, **settings).logits.cpu()
    finally:
        model.train(training)


def same(expected: torch.Tensor, found: torch.Tensor, precision: torch.dtype, uri: str) -> None:
    """Raise VerificationError unless two answers agree within what rounding in that precision allows."""
    tolerance = TOLERANCE[precision]
    expected, found = expected.float(), found.float()
    difference = (expected - found).abs().max().item()
    largest = expected.abs().max().item()
    # Written so that NaN fails.
    if not difference <= tolerance * max(largest, 1e-6):
        raise VerificationError(
            f"{uri} does not answer as the trained model: logits differ by {difference:.3g} of {largest:.3g}", ADVICE
        )


def adapter(
    strategy: AdapterStrategy, model: PreTrainedModel, delivered: Path, probe: Probe, precision: torch.dtype
) -> None:
    """Put the delivered adapter onto the base of the trained one, and compare; `model` is taken apart.

    Raises:
        VerificationError: it is empty, broken, or answers differently.
    """
    strategy.refuse_untrained(delivered)
    expected = logits(model, probe)
    # The frozen base that is in memory anyway: a second one may not fit beside it.
    again = strategy.together(strategy.apart(model), delivered)
    same(expected, logits(again.to(model.device), probe), precision, "the delivered adapter")


def differs_from(base: Path, delivered: Path) -> None:
    """Raise VerificationError when a delivered model is bit-equal to the base; holds one tensor of each at a time.

    What the base does not have, such as a new head, is a difference.
    """
    original, result = tensors.index(base), tensors.index(delivered)
    if result.keys() <= original.keys() and all(
        torch.equal(tensors.tensor(original, name), tensors.tensor(result, name)) for name in sorted(result)
    ):
        raise VerificationError("the delivered model is bit by bit the base", TRAIN_MORE)
