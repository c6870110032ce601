"""Our trainer over a tiny model and rows of tensors, without a job around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from finetune_api.strategy import StrategySpec
from finetune_trainer.learning import LeanRecomputationCallback
from finetune_trainer.loaded import Loaded
from finetune_trainer.statistics import hold_frozen_statistics
from finetune_trainer.strategies import strategy_of
from finetune_trainer.tasks.trainer import JobTrainer

Row = dict[str, torch.Tensor]


def text_rows(count: int, length: int = 12, classes: int = 2) -> list[Row]:
    """Tokens whose parity of the first one is the class."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 270, (count, length), generator=draw)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % classes} for row in ids]


def language_rows(count: int, length: int = 12) -> list[Row]:
    """Tokens to be predicted."""
    return [row | {"labels": row["input_ids"]} for row in text_rows(count, length)]


def image_rows(count: int, size: int = 16) -> list[Row]:
    """Noise that is brighter in class 1."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    pixels = torch.randn(count, 3, size, size, generator=draw) + labels[:, None, None, None]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def a_trainer(
    folder: Path,
    model: PreTrainedModel,
    rows: list[Row],
    strategy: dict[str, Any],
    fresh: tuple[str, ...] = (),
    trainer_class: type[Trainer] = JobTrainer,
    **arguments: Any,
) -> Trainer:
    """Ready to train; checkpoints are off.

    Args:
        strategy: in the names of the YAML.
        fresh: modules that the base did not have.
        trainer_class: another than ours, to see a strategy alone.
        arguments: of TrainingArguments.
    """
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": 7,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
    }
    it = strategy_of(StrategySpec.from_wire(strategy))
    prepared = it.prepare(Loaded(model, fresh=fresh))
    hold_frozen_statistics(prepared)
    learning = frozenset(name for name, parameter in prepared.named_parameters() if parameter.requires_grad)
    args = TrainingArguments(output_dir=str(folder), **settings | arguments)
    trainer = trainer_class(model=prepared, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LeanRecomputationCallback())
    # Some of the models take the number of labels and ignore it; then nobody would divide by the accumulation.
    trainer.model_accepts_loss_kwargs = False
    trainer.learning = learning
    it.attach(trainer)
    return trainer
