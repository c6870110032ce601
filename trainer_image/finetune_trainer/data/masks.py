"""Texts with learned stretches -> token ids with a mask of the same length, true where the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.templates import Span

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Supervised:
    """A text, what of it is learned, and whether it stands alone, with the tokenizer's BOS and a learned EOS."""

    text: str
    spans: list[Span]
    alone: bool


def tokenise(tokenizer: PreTrainedTokenizerBase, items: Sequence[Supervised]) -> list[tuple[Ids, Mask]]:
    """Token ids and masks, one pair for each item; a token is learned when any of its characters is."""
    texts = [item.text for item in items]
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    lead = lead_ids(tokenizer)
    pairs = zip(items, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_finished(tokenizer, item, lead, *_masked(tokenizer, item, ids, offsets)) for item, ids, offsets in pairs]


def rendered_sample(tokenizer: PreTrainedTokenizerBase, ids: Ids, mask: Mask) -> str:
    """The row as text, with [[ ]] around what is learned: for people who want to see it."""
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    stretches = [(start, end) for start, end in pairwise(cuts) if start < end]
    texts = [str(tokenizer.decode(ids[start:end].tolist())) for start, end in stretches]
    return "".join(f"[[{text}]]" if mask[start] else text for text, (start, _) in zip(texts, stretches, strict=True))


def _masked(
    tokenizer: PreTrainedTokenizerBase, item: Supervised, ids: list[int], offsets: list[Span]
) -> tuple[Ids, Mask]:
    whole = np.asarray(ids, dtype=np.int32)
    starts, ends, previous = _stretches(offsets)
    borders = np.unique([place for span in item.spans for place in span])
    if any(np.any((previous < border) & (border < ends)) for border in borders):
        pieces = _pieced(tokenizer, item, borders.tolist())
        # Tokenizers that put a space before every text cannot be given pieces: then the shared token is learned.
        if tokenizer.decode(pieces[0].tolist()) == tokenizer.decode(ids):
            return pieces
    mask = np.zeros(len(whole), dtype=bool)
    for start, end in item.spans:
        mask |= (starts < end) & (ends > start)
    return whole, mask


def _stretches(offsets: list[Span]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First characters, ends, and the ends of the tokens before.

    Byte-level tokenizers leave leading space out of their offsets, and a token of nothing but space gets an empty
    stretch: it then reaches back to the token before it.
    """
    table = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = table[:, 0], table[:, 1]
    previous = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
    return np.where(starts < ends, starts, previous), ends, previous


def _pieced(tokenizer: PreTrainedTokenizerBase, item: Supervised, borders: list[int]) -> tuple[Ids, Mask]:
    """Tokenised stretch by stretch: where one token would hold both the question's end and the answer's beginning.

    Text is generated after a prompt that was tokenised alone, so this is what the model meets when it is used.
    """
    cuts = [0, *borders, len(item.text)]
    stretches = [(start, end) for start, end in pairwise(cuts) if start < end]
    encoded = tokenizer([item.text[start:end] for start, end in stretches], add_special_tokens=False, verbose=False)
    ids, mask = [], []
    for (start, _), piece in zip(stretches, encoded["input_ids"], strict=True):
        ids += piece
        mask += [any(first <= start < end for first, end in item.spans)] * len(piece)
    return np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool)


def lead_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that this tokenizer puts before a text, or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _finished(
    tokenizer: PreTrainedTokenizerBase, item: Supervised, lead: list[int], ids: Ids, mask: Mask
) -> tuple[Ids, Mask]:
    if not item.alone:
        return ids, mask
    tail = [] if len(ids) and ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    ids = np.concatenate([lead, ids, tail]).astype(np.int32)
    return ids, np.concatenate([np.zeros(len(lead), bool), mask, np.ones(len(tail), bool)])
