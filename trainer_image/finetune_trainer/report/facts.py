"""Everything that is known of a run when it ends: the content of report.json, the page and the model card."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finetune_api.common import Message
from finetune_api.contract import Result
from finetune_trainer.angle import Angle


class Report(Message):
    """The content of report/report.json."""

    result: Result
    spec: dict[str, Any] = Field(description="The job's spec with all defaults filled in, without its pod additions.")
    data: dict[str, Any] = Field(description="What the dataset held, what was left out, and a row with its mask.")
    baseline: str = Field("base model", description="What the tuned model is compared with.")
    evaluation: dict[str, Any] = Field({}, description="More of the tuned model's evaluation, as the task knows it.")
    angles: list[Angle] = Field([], description="How far each block's parts have turned, where a model is delivered.")
    history: list[dict[str, float]] = Field(description="Loss, learning rate and evaluations by step.")
    warnings: list[str] = []

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every entry of the history that has the value."""
        return [(entry["step"], entry[name]) for entry in self.history if name in entry]
