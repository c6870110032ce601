"""Rows -> what the trainer reads: token ids, and labels that are -100 wherever nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.conversations import Conversation
from finetune_trainer.data.formats import FORMATS, Completion, Text
from finetune_trainer.data.masks import Ids, Mask, Masker, Supervised
from finetune_trainer.data.problems import Problem, RowError
from finetune_trainer.data.readers import Row
from finetune_trainer.data.templates import ChatTemplate

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Encoded:
    """A row, tokenised: one part, or for texts longer than max_length several.

    Attributes:
        parts: (ids, labels) of equal length, at most max_length; `labels[0]` is always IGNORED, since there is no
            token before it to predict it from; in a pack that token would be another document's.
        tokens: how long the row was before it was cut.
        cut: tokens that were cut off.
        open_turns: assistant turns that do not end with an end token.
    """

    parts: list[tuple[Ids, NDArray[np.int32]]]
    tokens: int
    cut: int = 0
    open_turns: int = 0

    def samples(self) -> list[dict[str, Any]]:
        """The parts as they are kept."""
        return [{"input_ids": ids, "labels": labels} for ids, labels in self.parts]


@dataclass(frozen=True)
class Encoder:
    """Everything that is needed to encode rows; can be pickled, and is the same in every process."""

    masker: Masker
    template: ChatTemplate | None
    format: str
    max_length: int

    @property
    def splits(self) -> bool:
        """Whether a row may become several samples."""
        return self.format == "text"

    def __call__(self, rows: Sequence[Row | Problem]) -> list[Encoded | Problem]:
        """One result for each row, in order; what is a problem already stays one."""
        items = [row if isinstance(row, Problem) else self._supervised(row) for row in rows]
        texts = [item for item in items if isinstance(item, Supervised)]
        pairs = iter(self.masker(texts) if texts else [])
        return [
            item if isinstance(item, Problem) else self._checked(row, item, *next(pairs))
            for row, item in zip(rows, items, strict=True)
        ]

    def _supervised(self, row: Row) -> Supervised | Problem:
        try:
            return self._read(row)
        except RowError as error:
            return Problem(row.file, row.line, str(error))
        except RecursionError:
            return Problem(row.file, row.line, "nested too deeply")

    def _read(self, row: Row) -> Supervised:
        canonical = FORMATS[self.format].read(row.value)
        if isinstance(canonical, Conversation):
            assert self.template is not None, "conversations are encoded with a template"
            return Supervised(*self.template.supervised(canonical), alone=False)
        if isinstance(canonical, Completion):
            text = canonical.prompt + canonical.completion
            return Supervised(text, [(len(canonical.prompt), len(text))], alone=True)
        assert isinstance(canonical, Text), "rows with labels have an encoder of their own"
        return Supervised(canonical.text, [(0, len(canonical.text))], alone=True)

    def _checked(self, row: Row | Problem, item: Supervised, ids: Ids, mask: Mask) -> Encoded | Problem:
        if self.splits:
            return self._split(row, ids, mask)
        labels = _labels(ids[: self.max_length], mask[: self.max_length])
        if not _learns(labels):
            return Problem(row.file, row.line, self._why_nothing(ids, mask))
        open_turns = self.template.unclosed(item.text, item.spans) if self.template and not item.alone else 0
        return Encoded([(ids[: self.max_length], labels)], len(ids), max(0, len(ids) - self.max_length), open_turns)

    def _split(self, row: Row | Problem, ids: Ids, mask: Mask) -> Encoded | Problem:
        """A long text is many rows: unlike an answer without its question, its later parts are as good as the first.

        Each begins with the last token of the one before, so that every token is learned once.
        """
        places = range(0, len(ids) - 1, self.max_length - 1)
        stretches = [slice(place, place + self.max_length) for place in places]
        parts = [(ids[stretch], _labels(ids[stretch], mask[stretch])) for stretch in stretches]
        if not parts:
            return Problem(row.file, row.line, f"the text has {len(ids)} token, and learning takes two")
        return Encoded(parts, len(ids))

    def _why_nothing(self, ids: Ids, mask: Mask) -> str:
        if len(ids) > self.max_length and _learns(_labels(ids, mask)):
            first = int(np.flatnonzero(mask)[0])
            return (
                f"the row has {len(ids)} tokens and its first answer begins at token {first + 1}, beyond "
                f"hyperparameters.maxLength {self.max_length}, so it teaches nothing; raise maxLength or shorten it"
            )
        return "the row teaches nothing: no token of it is the assistant's"


def _labels(ids: Ids, mask: Mask) -> NDArray[np.int32]:
    labels = np.where(mask, ids, IGNORED).astype(np.int32)
    labels[:1] = IGNORED
    return labels


def _learns(labels: NDArray[np.int32]) -> bool:
    return bool(np.any(labels != IGNORED))
