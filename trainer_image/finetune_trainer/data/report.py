"""What was found in the data: the counts and the decoded sample by which people check the supervision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.encoding import IGNORED, Encoded
from finetune_trainer.data.masks import rendered_sample
from finetune_trainer.data.tally import Tally

SAMPLE_TOKENS = 512
"""The sample is for reading: of a longer row the beginning will do."""


@dataclass
class TokenTally(Tally, ABC):
    """Of rows that have become tokens."""

    tokens: int = 0
    longest: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0

    def count(self, result: Any) -> None:
        super().count(result)
        self.tokens += sum(len(sample["input_ids"]) for sample in result.samples())
        self.longest = max(self.longest, result.tokens)
        self.cut_rows += result.cut > 0
        self.cut_tokens += result.cut

    def report(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        return self.counts() | {"sample": self.sample(tokenizer)}

    def counts(self) -> dict[str, Any]:
        return super().counts() | {
            "tokens": self.tokens,
            "longestRowTokens": self.longest,
            "cutRows": self.cut_rows,
            "cutTokens": self.cut_tokens,
        }

    @abstractmethod
    def sample(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row, as people can check it."""

    def warnings(self, limit: str) -> list[str]:
        found = super().warnings(limit)
        if self.cut_rows:
            found.append(
                f"{self.cut_rows} of {self.used} rows were cut to {limit} "
                f"({self.cut_tokens} tokens lost; the longest row has {self.longest}); their ends are not learned"
            )
        return found


@dataclass
class TextTally(TokenTally):
    """Of rows whose tokens are learned."""

    learned: int = 0
    open_turns: int = 0
    first: Encoded | None = None

    def count(self, result: Encoded) -> None:
        super().count(result)
        self.learned += sum(int(np.count_nonzero(labels != IGNORED)) for _, labels in result.parts)
        self.open_turns += result.open_turns
        self.first = self.first or result

    def counts(self) -> dict[str, Any]:
        return super().counts() | {
            "learnedTokens": self.learned,
            "learnedShare": round(self.learned / self.tokens, 4) if self.tokens else 0.0,
            "turnsWithoutEndToken": self.open_turns,
        }

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row as text, with [[ ]] around what is learned."""
        if self.first is None:
            return ""
        ids, labels = (array[:SAMPLE_TOKENS] for array in self.first.parts[0])
        return rendered_sample(tokenizer, ids, labels != IGNORED)

    def warnings(self, limit: str) -> list[str]:
        found = super().warnings(limit)
        if self.open_turns:
            found.append(
                f"{self.open_turns} answers do not end with a token that ends a turn, as the model's chat "
                "template writes them, so the model does not learn to stop there"
            )
        return found


def warnings(parts: Mapping[str, Tally], ignored: list[str], limit: str) -> list[str]:
    """What a user should know though the data can be used, in sentences with numbers.

    Args:
        limit: what rows are cut to, in words.
    """
    found = [f"{name}: {warning}" for name, tally in parts.items() for warning in tally.warnings(limit)]
    if ignored:
        found.append(f"{len(ignored)} files have no known ending and were left out: {', '.join(ignored[:3])}")
    return found
