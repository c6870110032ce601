"""What was found in the data: the counts and the decoded sample by which people check the supervision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.encoding import IGNORED, Encoded
from finetune_trainer.data.masks import rendered_sample
from finetune_trainer.data.problems import Problem, Problems

SAMPLE_TOKENS = 512
"""The sample is for reading: of a longer row the beginning will do."""


@dataclass
class Tally:
    """Counts over the rows of one part (training or validation)."""

    format: str
    used: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    open_turns: int = 0
    problems: Problems = field(default_factory=Problems)
    sample: Encoded | None = None

    def add(self, result: Encoded | Problem) -> None:
        if isinstance(result, Problem):
            self.problems.add(result)
            return
        self.used += 1
        self.tokens += sum(len(ids) for ids, _ in result.parts)
        self.learned += sum(int(np.count_nonzero(labels != IGNORED)) for _, labels in result.parts)
        self.longest = max(self.longest, result.tokens)
        self.cut_rows += result.cut > 0
        self.cut_tokens += result.cut
        self.open_turns += result.open_turns
        self.sample = self.sample or result

    def report(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        return {
            "rows": self.used,
            "tokens": self.tokens,
            "learnedTokens": self.learned,
            "learnedShare": round(self.learned / self.tokens, 4) if self.tokens else 0.0,
            "longestRowTokens": self.longest,
            "cutRows": self.cut_rows,
            "cutTokens": self.cut_tokens,
            "turnsWithoutEndToken": self.open_turns,
            "dropped": self.problems.report(),
            "sample": self._sample(tokenizer),
        }

    def _sample(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row as text, with [[ ]] around what is learned."""
        if self.sample is None:
            return ""
        ids, labels = (array[:SAMPLE_TOKENS] for array in self.sample.parts[0])
        return rendered_sample(tokenizer, ids, labels != IGNORED)


def warnings(parts: Mapping[str, Tally], ignored: list[str], max_length: int) -> list[str]:
    """What a user should know though the data can be used, in sentences with numbers."""
    found = []
    for name, tally in parts.items():
        if tally.problems.count:
            found.append(
                f"{name}: {tally.problems.count} of {tally.problems.count + tally.used} rows were dropped; "
                f"the first: {tally.problems.first[0]}"
            )
        if tally.cut_rows:
            found.append(
                f"{name}: {tally.cut_rows} of {tally.used} rows were cut to hyperparameters.maxLength {max_length} "
                f"({tally.cut_tokens} tokens lost; the longest row has {tally.longest}); their ends are not learned"
            )
        if tally.open_turns:
            found.append(
                f"{name}: {tally.open_turns} answers do not end with a token that ends a turn, as the model's chat "
                "template writes them, so the model does not learn to stop there"
            )
    if ignored:
        found.append(f"{len(ignored)} files have no known ending and were left out: {', '.join(ignored[:3])}")
    return found
