"""Proof that what lies in the bucket is what was trained: not empty, not the base, loads, and answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of two logits, as a share of the largest logit, by the lowest precision that had a part in them:
kernels may add in another order, no more."""
ADVICE = "this is an error of the trainer or of the storage, not of the spec; the last checkpoint is complete"


class VerificationError(TrainerError):
    """What was delivered is not what was trained."""


@torch.no_grad()
def logits(model: torch.nn.Module, probe: torch.Tensor) -> torch.Tensor:
    """The model's answer to token ids (rows, tokens): logits (rows, tokens, vocabulary), on the CPU."""
    training = model.training
    model.eval()
    try:
        return model(input_ids=probe, use_cache=False).logits.cpu()
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


def adapter(model: PeftModel, delivered: Path, probe: torch.Tensor, precision: torch.dtype) -> None:
    """Load the delivered adapter onto the base of the trained one, and compare; `model` is taken apart.

    Raises:
        VerificationError: it is empty, broken, or answers differently.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    tensors = load_file(delivered / "adapter_model.safetensors")
    refuse_empty(tensors, delivered)
    expected = logits(model, probe)
    # The frozen base that is in memory anyway: a second one may not fit beside it.
    base = model.unload()
    again = PeftModel.from_pretrained(base, str(delivered))
    same(expected, logits(again, probe), precision, "the delivered adapter")


def refuse_empty(tensors: dict[str, torch.Tensor], delivered: Path) -> None:
    """Raise VerificationError for an adapter that holds nothing, or whose update is still zero."""
    updates = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not updates:
        raise VerificationError(f"the adapter in {delivered} holds no update ({len(tensors)} tensors)", ADVICE)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise VerificationError(f"the adapter in {delivered} holds numbers that are not finite", ADVICE)
    if not any(tensor.norm() > 0 for tensor in updates):
        raise VerificationError(
            "the adapter is as it was before training: every lora_B is zero",
            "train for more steps, or with a higher hyperparameters.learningRate",
        )


def differs_from(base: Path, delivered: Path) -> None:
    """Raise VerificationError when a delivered model is bit-equal to the base; holds one tensor of each at a time."""
    original, result = _index(base), _index(delivered)
    common = original.keys() & result.keys()
    if common and all(torch.equal(_tensor(original, name), _tensor(result, name)) for name in sorted(common)):
        raise VerificationError(
            "the delivered model is bit by bit the base",
            "train for more steps or with a higher hyperparameters.learningRate: smaller changes vanish in the "
            "precision that the base is stored in",
        )


def _index(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _tensor(index: dict[str, Path], name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(index[name], framework="pt") as file:
        return file.get_tensor(name)
