"""Counts over the rows of a dataset, whatever becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from finetune_trainer.data.problems import Problem, Problems


@dataclass
class Tally:
    """Counts over the rows of one part (training or validation)."""

    format: str
    used: int = 0
    problems: Problems = field(default_factory=Problems)

    def add(self, result: Any) -> None:
        if isinstance(result, Problem):
            self.problems.add(result)
        else:
            self.count(result)

    def count(self, result: Any) -> None:
        """Count a row that can be used."""
        self.used += 1

    def counts(self) -> dict[str, Any]:
        """All that can be counted, in the words of the report."""
        return {"rows": self.used, "dropped": self.problems.report()}

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, as JSON."""
        return {name: getattr(self, name) for name in self._numbers()} | {"problems": self.problems.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Count on from a state."""
        for name in self._numbers():
            setattr(self, name, state[name])
        self.problems = Problems.of(state["problems"])

    def _numbers(self) -> list[str]:
        return [item.name for item in fields(self) if isinstance(getattr(self, item.name), int)]

    def warnings(self, limit: str) -> list[str]:
        """What a user should know though the rows can be used, in sentences with numbers.

        Args:
            limit: what rows are cut to, in words.
        """
        if not self.problems.count:
            return []
        total = self.problems.count + self.used
        return [f"{self.problems.count} of {total} rows were dropped; the first: {self.problems.first[0]}"]
