"""What is learned of a row, in words."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.encoding import IGNORED, Encoded, Encoder
from finetune_trainer.data.masks import Masker
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Row
from finetune_trainer.data.templates import chat_template

LONG = 100_000


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], name: str, max_length: int = LONG
) -> Encoded | Problem:
    """The row as a format of this name."""
    template = None if name == "text" else chat_template(tokenizer)
    (result,) = Encoder(Masker.of(tokenizer), template, name, max_length)([Row("a.jsonl", 1, row)])
    return result


def stretches(tokenizer: PreTrainedTokenizerBase, result: Encoded) -> list[str]:
    """What is learned, decoded stretch by stretch."""
    ((ids, labels),) = result.parts
    mask = labels != IGNORED
    assert np.array_equal(labels[mask], ids[mask])
    cuts = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
