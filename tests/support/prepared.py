"""Strategies on models that are there already, without a job around them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune_api.defaults import OPTIONS
from finetune_api.strategy import StrategySpec
from finetune_trainer.loaded import Loaded
from finetune_trainer.strategies import Strategy, strategy_of
from tests.support.architectures import IMAGE, VOCABULARY

Batch = dict[str, torch.Tensor]
LENGTH = 10


def a_strategy(kind: str, **options: Any) -> Strategy:
    """A strategy with the options of its member in the API, and defaults for the rest."""
    fields = OPTIONS[StrategySpec(type=kind).type]
    member = StrategySpec.model_fields[next(iter(fields))].alias
    spec = StrategySpec.from_wire({"type": kind, member: options})
    for field, default in fields.items():
        if getattr(spec, field) is None:
            setattr(spec, field, default())
    return strategy_of(spec)


def a_batch(model: PreTrainedModel, rows: int = 4) -> Batch:
    """Rows as the model takes them, the same ones every time: images or tokens with classes, or tokens alone."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % max(2, model.config.num_labels)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=draw), "labels": labels}
    ids = torch.randint(4, VOCABULARY, (rows, LENGTH), generator=draw)
    classifies = "ForSequenceClassification" in type(model).__name__
    return {"input_ids": ids, "labels": labels if classifies else ids}


def loaded(model: PreTrainedModel, fresh: Iterable[str] = (), **settings: Any) -> Loaded:
    """What a task would hand over."""
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    peft_task = next((task for name, task in tasks.items() if name in type(model).__name__), None)

    def examples(count: int) -> list[Batch]:
        batch = a_batch(model, count)
        return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(count)]

    return Loaded(model, tuple(fresh), peft_task, examples=examples, **settings)


def learn(model: PreTrainedModel, batch: Batch, steps: int = 3, rate: float = 1e-2) -> list[float]:
    """Some steps of AdamW on what learns; the losses, under autocast where the model is held in bfloat16."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype is torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def answer(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits."""
    model.eval()
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def delivered(strategy: Strategy, model: PreTrainedModel, folder: Path) -> Path:
    """The folder with what the strategy exports."""
    folder.mkdir(parents=True, exist_ok=True)
    strategy.export(model, folder, "file:///base", torch.float32)
    return folder
