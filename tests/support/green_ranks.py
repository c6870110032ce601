"""One rank of a training with Green, started by torchrun: `-m tests.support.green_ranks SETTINGS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.strategies.green.callback import GreenSelection
from tests.support.architectures import tiny_bert, tiny_llama
from tests.support.trainers import a_trainer, language_rows, text_rows


def shard_on_cpus() -> None:
    """Let accelerate shard where there are only CPUs, which it does on accelerators only."""
    initialise = AcceleratorState.__init__

    def initialise_and_shard(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise_and_shard  # type: ignore[method-assign]


class FusingTrainer(Trainer):
    """With the loss in the head, as TRL's trainers have it: the head's weight is used, its module never called."""

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        return super().compute_loss(model, {**inputs, "fused_lm_head": True}, *arguments, **named)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
        trainer_class=FusingTrainer if kind == "Llama with a fused head" else Trainer,
        **arguments,
    )
    ever = Ever(trainer)
    trainer.train(resume_from_checkpoint=resume)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "green_share" in entry]
    rank = os.environ.get("RANK", "0")
    (folder / f"told-{rank}.json").write_text(json.dumps({"history": history, "chosen": sorted(ever.names)}))
    weights = {name: whole(parameter).detach() for name, parameter in trainer.model.named_parameters()}
    torch.save(weights, folder / f"weights-{rank}.pt")


def main(settings: dict[str, Any]) -> None:
    """The whole training, and then once more from its first checkpoint where there is one."""
    torch.set_num_threads(1)
    arguments: dict[str, Any] = settings["arguments"]
    if "fsdp_config" in arguments:
        shard_on_cpus()
    folder = Path(settings["folder"])
    run(folder / "whole", settings["model"], None, arguments)
    if every := arguments.get("save_steps"):
        run(folder / "resumed", settings["model"], str(folder / f"whole/checkpoint-{every}"), arguments)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
