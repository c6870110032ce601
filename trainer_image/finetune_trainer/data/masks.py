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
Stretch = tuple[str, bool]
"""A piece of text, and whether it is learned."""


@dataclass(frozen=True)
class Supervised:
    """A text, what of it is learned, and whether it stands alone, with the tokenizer's BOS and a learned EOS."""

    text: str
    spans: list[Span]
    alone: bool

    @property
    def whole(self) -> bool:
        """Whether all of it is learned, so that nothing has to be told apart."""
        return self.spans == [(0, len(self.text))]


@dataclass(frozen=True)
class Masker:
    """Tokenises texts with their masks. Can be pickled.

    Attributes:
        lead: the BOS that this tokenizer puts before a text that stands alone, or nothing.
        in_pieces: whether the tokenizer takes a text in pieces. If so, question and answer are tokenised apart, as
            they are when the model is used: the prompt is complete before a word of the answer is there. If not
            (sentence-piece tokenizers put a space before every piece), they are tokenised together, and a token that
            belongs to both is learned.
    """

    tokenizer: PreTrainedTokenizerBase
    lead: list[int]
    in_pieces: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Masker:
        return cls(tokenizer, lead_ids(tokenizer), _takes_pieces(tokenizer))

    def __call__(self, items: Sequence[Supervised]) -> list[tuple[Ids, Mask]]:
        """Token ids and masks, one pair for each item."""
        in_pieces = self.in_pieces or all(item.whole for item in items)
        pairs = self._pieces(items) if in_pieces else self._wholes(items)
        return [self._finished(item, *pair) for item, pair in zip(items, pairs, strict=True)]

    def _pieces(self, items: Sequence[Supervised]) -> list[tuple[Ids, Mask]]:
        stretches = [_stretches(item) for item in items]
        encoded = iter(self._ids([text for row in stretches for text, _ in row]))
        return [_joined([(next(encoded), learned) for _, learned in row]) for row in stretches]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """As the tokenizer's own call gives them; that works out offsets too, which takes half as long again."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _wholes(self, items: Sequence[Supervised]) -> list[tuple[Ids, Mask]]:
        encoded = self.tokenizer(
            [item.text for item in items],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        rows = zip(items, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(np.asarray(ids, dtype=np.int32), _touched(item.spans, offsets)) for item, ids, offsets in rows]

    def _finished(self, item: Supervised, ids: Ids, mask: Mask) -> tuple[Ids, Mask]:
        if not item.alone:
            return ids, mask
        eos = self.tokenizer.eos_token_id
        tail = [] if len(ids) and ids[-1] == eos else [eos]
        ids = np.concatenate([self.lead, ids, tail]).astype(np.int32)
        return ids, np.concatenate([np.zeros(len(self.lead), bool), mask, np.ones(len(tail), bool)])


def lead_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that this tokenizer puts before a text, or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def rendered_sample(tokenizer: PreTrainedTokenizerBase, ids: Ids, mask: Mask) -> str:
    """The row as text, with [[ ]] around what is learned: for people who want to see it."""
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    stretches = [(start, end) for start, end in pairwise(cuts) if start < end]
    texts = [str(tokenizer.decode(ids[start:end].tolist())) for start, end in stretches]
    return "".join(f"[[{text}]]" if mask[start] else text for text, (start, _) in zip(texts, stretches, strict=True))


def _takes_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = [("a", "b"), ("a\n", "b"), ("a:", " b"), ("a", "\n b")]
    return all(tokenizer.decode(ids(one) + ids(other)) == one + other for one, other in pairs)


def _stretches(item: Supervised) -> list[Stretch]:
    """The text cut where learning begins and ends."""
    cuts = sorted({0, len(item.text), *(place for span in item.spans for place in span)})
    learned = {start for start, _ in item.spans}
    return [(item.text[start:end], start in learned) for start, end in pairwise(cuts)]


def _joined(pieces: list[tuple[list[int], bool]]) -> tuple[Ids, Mask]:
    ids = [token for piece, _ in pieces for token in piece]
    mask = np.repeat([learned for _, learned in pieces], [len(piece) for piece, _ in pieces])
    return np.asarray(ids, dtype=np.int32), mask.astype(bool)


def _touched(spans: list[Span], offsets: list[Span]) -> Mask:
    """Which tokens hold any character of the spans.

    A token of nothing but space may have an empty stretch, since leading space is left out of the offsets; it then
    reaches back to the token before it.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    before = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
    starts = np.where(starts < ends, starts, before)
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    return mask
