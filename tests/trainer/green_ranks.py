"""One rank of a training with Green, started by torchrun: `-m tests.trainer.green_ranks SETTINGS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.learning import plainly_named
from finetune_trainer.strategies.green.callback import GreenSelection
from tests.support.architectures import tiny_bert, tiny_llama
from tests.support.trainers import a_trainer, language_rows, text_rows
from tests.trainer.ranks import PlainTrainer, checkpoints_in, pretend_to_have_gpus, whole


class FusingTrainer(PlainTrainer):
    """With the loss in the head, as TRL's trainers have it: the head's weight is used, its module never called."""

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        return super().compute_loss(model, {**inputs, "fused_lm_head": True}, *arguments, **named)


class Ever(TrainerCallback):
    """Collects what has been chosen so far."""

    def __init__(self, trainer: Trainer) -> None:
        self.names: set[str] = set()
        self._callbacks = trainer.callback_handler
        trainer.add_callback(self)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        (selection,) = (it for it in self._callbacks.callbacks if isinstance(it, GreenSelection))
        self.names |= set(selection.names or [])


def make(kind: str) -> PreTrainedModel:
    """A model without randomness while it trains."""
    if kind == "BERT":
        return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = tiny_llama()
    if kind == "Llama with a fused head":
        add_fused_lm_head(model)
    return model


def run(folder: Path, kind: str, resume: str | None, arguments: dict[str, Any]) -> None:
    """Train, and leave in the folder what this rank has seen and what the whole weights are."""
    trainer = a_trainer(
        folder,
        make(kind),
        (text_rows if kind == "BERT" else language_rows)(64),
        {"type": "Green", "green": {"target": 0.6, "everySteps": 3}},
        trainer_class=FusingTrainer if kind == "Llama with a fused head" else PlainTrainer,
        **arguments,
    )
    ever = Ever(trainer)
    trainer.checkpoints = checkpoints_in(folder, trainer.args)
    trainer.train(resume_from_checkpoint=resume)
    trainer.checkpoints.close()
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "green_share" in entry]
    rank = os.environ.get("RANK", "0")
    (folder / f"told-{rank}.json").write_text(json.dumps({"history": history, "chosen": sorted(ever.names)}))
    weights = {name: whole(parameter) for name, parameter in plainly_named(trainer.model)}
    torch.save(weights, folder / f"weights-{rank}.pt")


def main(settings: dict[str, Any]) -> None:
    """The whole training, and then once more from its first checkpoint where there is one."""
    torch.set_num_threads(1)
    arguments: dict[str, Any] = settings["arguments"]
    if "fsdp_config" in arguments:
        pretend_to_have_gpus()
    folder = Path(settings["folder"])
    run(folder / "whole", settings["model"], None, arguments)
    if every := arguments.get("save_steps"):
        run(
            folder / "resumed", settings["model"], str(folder / f"whole/bucket/checkpoints/step-{every:08d}"), arguments
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
