"""Labelled texts -> tokens, and the label as it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.class_columns import LABEL
from finetune_trainer.data.formats import FORMATS, Labeled
from finetune_trainer.data.labels import Labels
from finetune_trainer.data.problems import Problem, RowError
from finetune_trainer.data.readers import Row
from finetune_trainer.data.report import SAMPLE_TOKENS, TokenTally


@dataclass(frozen=True)
class EncodedLabel:
    """A labelled row, tokenised.

    Attributes:
        ids: at most max_length, with the model's special tokens.
        types: which of two texts a token belongs to; None where the model does not ask.
        tokens: how long the row was before it was cut.
        cut: tokens that were cut off.
    """

    ids: list[int]
    types: list[int] | None
    label: Any
    tokens: int
    cut: int

    def samples(self) -> list[dict[str, Any]]:
        """The one row that becomes of it."""
        types = {} if self.types is None else {"token_type_ids": np.asarray(self.types, dtype=np.int8)}
        return [{"input_ids": np.asarray(self.ids, dtype=np.int32), LABEL: self.label, **types}]


@dataclass(frozen=True)
class LabeledEncoder:
    """Tokenises labelled texts; can be pickled.

    Attributes:
        typed: whether the model asks which of two texts a token belongs to.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: Labels
    format: str
    max_length: int
    typed: bool

    @property
    def splits(self) -> bool:
        """Whether a row may become several samples."""
        return False

    def __call__(self, rows: Sequence[Row | Problem]) -> list[EncodedLabel | Problem]:
        """One result for each row, in order; what is a problem already stays one."""
        items = [row if isinstance(row, Problem) else self._read(row) for row in rows]
        usable = [item for item in items if isinstance(item, Labeled)]
        encoded = iter(self._encoded(usable))
        return [item if isinstance(item, Problem) else next(encoded) for item in items]

    def _read(self, row: Row) -> Labeled | Problem:
        try:
            item = FORMATS[self.format].read(row.value)
            assert isinstance(item, Labeled), "the API lets these tasks have no other format"
            return replace(item, label=self.labels.read(item.label))
        except RowError as error:
            return Problem(row.file, row.line, str(error))

    def _encoded(self, items: list[Labeled]) -> list[EncodedLabel]:
        whole = self._tokens(items)
        long = [i for i, (ids, _) in enumerate(whole) if len(ids) > self.max_length]
        # Cutting is the tokenizer's: it keeps the special tokens, and takes from the longer of two texts.
        cut = dict(zip(long, self._tokens([items[i] for i in long], cut=True), strict=True))
        results = []
        for i, (item, (ids, types)) in enumerate(zip(items, whole, strict=True)):
            kept, kept_types = cut.get(i, (ids, types))
            results.append(EncodedLabel(kept, kept_types, item.label, len(ids), len(ids) - len(kept)))
        return results

    def _tokens(self, items: list[Labeled], cut: bool = False) -> list[tuple[list[int], list[int] | None]]:
        """(ids, types) of each; alone or with its pair, in two calls, since the tokenizer takes all the same way."""
        found: dict[int, tuple[list[int], list[int] | None]] = {}
        for paired in (False, True):
            numbers = [i for i, item in enumerate(items) if (item.pair is not None) is paired]
            if numbers:
                encoding = self.tokenizer(
                    [items[i].text for i in numbers],
                    [items[i].pair for i in numbers] if paired else None,
                    truncation="longest_first" if cut else False,
                    max_length=self.max_length if cut else None,
                    return_attention_mask=False,
                    return_token_type_ids=self.typed,
                    verbose=False,
                )
                types = encoding["token_type_ids"] if self.typed else [None] * len(numbers)
                found |= dict(zip(numbers, zip(encoding["input_ids"], types, strict=True), strict=True))
        return [found[i] for i in range(len(items))]


@dataclass
class LabelTally(TokenTally):
    """Of labelled rows."""

    first: EncodedLabel | None = None

    def count(self, result: EncodedLabel) -> None:
        super().count(result)
        self.first = self.first or result

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row as the model reads it, and its label."""
        if self.first is None:
            return ""
        return f"{tokenizer.decode(self.first.ids[:SAMPLE_TOKENS])} -> {self.first.label}"
