"""What the model answers to held-out prompts: greedy, so that before and after differ by the training alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune_trainer.data.samples import Sample

MAX_NEW_TOKENS = 96
"""Enough for a look, little enough for a CPU."""
BATCH = 8


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    eos_token_ids: list[int],
    positions: int,
    beat: Callable[[], None],
) -> list[str]:
    """The model's answer to each sample, in their order; draws no random numbers.

    Args:
        eos_token_ids: tokens that end an answer.
        positions: how many tokens prompt and answer may have together.
        beat: called between batches; may raise to end it.
    """
    training = model.training
    model.eval()
    found: list[str] = []
    # What is around an adapted model is not called when it generates.
    around = model if isinstance(model, FSDPModule) else None
    if around is not None:
        around.unshard()
    try:
        for start in range(0, len(samples), BATCH):
            beat()
            batch = [sample.input_ids for sample in samples[start : start + BATCH]]
            found += _batch(model, tokenizer, batch, eos_token_ids, positions)
    finally:
        model.train(training)
        if around is not None:
            around.reshard()
    return found


@torch.no_grad()
def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    eos_token_ids: list[int],
    positions: int,
) -> Iterable[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_token_ids[0]
    # On the left: the model goes on from the last token of the row.
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(1, min(MAX_NEW_TOKENS, positions - width)),
        eos_token_id=eos_token_ids,
        pad_token_id=pad,
        # Training has switched it off in the configuration.
        use_cache=True,
    )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in output[:, width:]]
