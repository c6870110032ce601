"""What a look at held-out rows gives."""

from __future__ import annotations

from typing import Any

from finetune_api.common import Message


class Measured(Message):
    """Of the model before or after training, or of what it is compared with."""

    what: str = "base model"
    """Of what, for people, where this is what the tuned model is compared with."""
    metrics: dict[str, float] = {}
    """By name, such as eval_loss."""
    answers: list[str] = []
    """To the held-out prompts, in their order."""
    details: dict[str, Any] = {}
    """More for the report, such as a confusion matrix, as JSON."""
