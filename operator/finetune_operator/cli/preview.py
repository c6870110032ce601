"""What a job will train, asked of the trainer, which builds the model from its config.json without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_operator.cli.trainer import Question, UnknownError

TRAINER_PREVIEW = "finetune_trainer.preview"
MOST_MODULES = 24


def what_trains(question: Question) -> Iterator[str]:
    """What will train, in a few lines; or why that cannot be told from here."""
    try:
        yield from _lines(question.ask(TRAINER_PREVIEW))
    except UnknownError as error:
        yield f"what will train is not known: {error}"


def _lines(preview: Mapping[str, Any]) -> Iterator[str]:
    trainable, total, share = preview["trainable"], preview["total"], preview["share"]
    yield f"will train {trainable:,} of {total:,} parameters ({share:.3%})"
    modules = preview["modules"]
    for module in modules[:MOST_MODULES]:
        where = f"blocks {module['layers']}: " if module.get("layers") else ""
        kind = f"{module['kind']}, " if module.get("kind") else ""
        yield f"  {where}{module['module']} ({kind}{module['parameters']:,})"
    if len(modules) > MOST_MODULES:
        yield f"  and {len(modules) - MOST_MODULES} more"
    for note in preview["notes"]:
        yield f"  {note}"
