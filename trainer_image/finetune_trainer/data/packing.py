"""Several short rows in one of max_length, without a way from one to another.

What keeps them apart depends on the attention implementation, so collator and arguments come from one place:

* sdpa, eager, flex: rows of (batch, max_length) with positions that begin at 0 for each document and no
  attention_mask. transformers reads the documents off the positions and builds a block-diagonal causal mask.
  TRL's own way, one row of batch * max_length, would give the same at `batch` times the memory and time of attention.
* flash attention: TRL's one row, where the positions become the sequence boundaries of the varlen kernels;
  transformers takes positions for boundaries in that layout only.

The first label of every document is -100 (see encoding.Encoded), since what precedes it is another document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.data.encoding import IGNORED
from finetune_trainer.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ["input_ids", "labels"]
HALF = (torch.bfloat16, torch.float16)


def uses_flash(attention: str) -> bool:
    """Whether an attention implementation, as the model's config names it, has varlen kernels."""
    return "flash" in attention


def sft_arguments(packed: bool, attention: str) -> dict[str, Any]:
    """SFTConfig arguments for datasets of `preparation.prepare`: nothing is tokenised, cut or packed again."""
    return {
        "packing": False,
        "padding_free": packed and uses_flash(attention),
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "shuffle_dataset": False,
    }


def collator(packed: bool, attention: str, tokenizer: PreTrainedTokenizerBase) -> PackedCollator | None:
    """The data_collator for SFTTrainer; None where TRL's own is the right one."""
    if not packed or uses_flash(attention):
        return None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PackedCollator(pad)


@dataclass(frozen=True)
class PackedCollator:
    """Packs -> tensors of (batch, longest pack): input_ids, labels, position_ids.

    Deliberately no attention_mask, and no cache: with either, transformers does not look for documents in the
    positions, and every document sees those before it without a word of warning.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), width)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            # Every padding token stands at position 0: a document of its own, that nothing looks at.
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "use_cache": False,
        }
        for i, example in enumerate(examples):
            positions = torch.cat([torch.arange(length) for length in example["seq_lengths"]])
            batch["position_ids"][i, : len(positions)] = positions
            for name in COLUMNS:
                batch[name][i, : len(positions)] = torch.tensor(example[name])
        return batch


@torch.no_grad()
def verify_isolation(model: PreTrainedModel) -> None:
    """Run two documents in a pack, change the first, and see that the second does not notice.

    Attention is kept apart by its mask, but layers that carry a state along (Mamba, linear attention, convolutions)
    are not, and what a model is made of shows only here. Costs two forward passes of 8 tokens.

    Raises:
        UsageError: a document in a pack reaches the next one.
    """
    length, vocabulary = 4, model.config.get_text_config().vocab_size
    ids = torch.arange(4 * length).reshape(2, 2 * length) % vocabulary
    ids[1, length:] = ids[0, length:]
    packs = [{"input_ids": row, "labels": row, "seq_lengths": [length, length]} for row in ids.tolist()]
    attention = model.config.get_text_config()._attn_implementation or "eager"
    training = model.training
    model.eval()
    try:
        first, second = [_logits(model, pack, attention)[length:] for pack in packs]
    finally:
        model.train(training)
    if not torch.allclose(first, second, rtol=0, atol=1e-5 * max(1.0, first.abs().max().item())):
        raise UsageError(
            f"hyperparameters.packing: {type(model).__name__} carries state from one document of a pack into the next",
            "set hyperparameters.packing to false",
        )


def _logits(model: PreTrainedModel, pack: dict[str, Any], attention: str) -> torch.Tensor:
    """Of one pack, (tokens, vocabulary), by the collator that training would use."""
    if uses_flash(attention):
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([pack])
    else:
        batch = PackedCollator(0)([pack])
    del batch["labels"]
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    # Some strategies hold only what is frozen in half precision, which runs under autocast alone.
    half = next((parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF), None)
    with torch.autocast(model.device.type, dtype=half or torch.bfloat16, enabled=half is not None):
        return model(**batch | {"use_cache": False}).logits[0].float()
