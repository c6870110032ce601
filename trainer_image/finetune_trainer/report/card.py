"""The model card that is delivered with an adapter or model."""

from __future__ import annotations

import json
from typing import Protocol

from finetune_trainer.report.facts import Report
from finetune_trainer.strategies.base import WHOLE_MODEL

CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: {pipeline_tag}
tags: [fine-tuned, {strategy}]
---

# {job}

`{base}`, fine-tuned with the strategy {strategy} for the task {task}.{answers}

## How to load it

```python
{loading}
```

## Data

Trained on `{dataset}`: {rows}. Licences and personal data of these rows were not examined.

## Parameters

{trainable:,} of {total:,} parameters were trained, for {steps} optimizer steps{tokens}.
The weights are those of step {exported}.

```json
{parameters}
```

## Metrics

{metrics}

## Limits

What the base model gets wrong, the tuned model may get wrong too; and outside of what its training data shows it may be
worse than the base. The metrics above were measured on rows of the same kind as the training data only.
"""


class Loading(Protocol):
    """What a card says of the strategy."""

    library: str
    loading: str


class Facts(Protocol):
    """What a card says of the task."""

    loader: str
    pipeline_tag: str

    @property
    def settings(self) -> str: ...
    @property
    def answers(self) -> str: ...


def card(report: Report, kind: str, strategy: Loading, task: Facts) -> str:
    """The card, in Markdown with the front matter that hubs read.

    Args:
        kind: `adapter` or `model`: which of the two folders it lies in.
    """
    spec, result = report.spec, report.result
    loading = strategy.loading if kind == "adapter" else WHOLE_MODEL
    rows = report.data.get("rows", {})
    return CARD.format(
        base=spec["model"]["uri"],
        library=strategy.library if kind == "adapter" else "transformers",
        strategy=spec["strategy"]["type"],
        job=result.job,
        task=spec["task"]["type"],
        loading=loading.format(loader=task.loader, settings=task.settings),
        answers=f" {task.answers}" if task.answers else "",
        pipeline_tag=task.pipeline_tag,
        dataset=spec["dataset"]["uri"],
        rows=", ".join(f"{count:,} rows for {name}" for name, count in rows.items()) or "see report.json",
        trainable=result.trainable_parameters,
        total=result.total_parameters,
        steps=result.steps,
        exported=result.exported_step,
        tokens=f" ({result.tokens:,} tokens)" if result.tokens else "",
        parameters=json.dumps({name: spec[name] for name in ("strategy", "hyperparameters")}, indent=1),
        metrics=_metrics(report),
    )


def _metrics(report: Report) -> str:
    result = report.result
    if not result.metrics:
        return "There were no held-out rows."
    lines = [
        f"| {name} | {result.baseline.get(name, float('nan')):.4g} | {value:.4g} |"
        for name, value in sorted(result.metrics.items())
    ]
    return "\n".join([f"| held-out rows | {report.baseline} | tuned |", "|---|---|---|", *lines])
