"""Two processes (or one) that train a tiny model with unfreezing; run by test_distributed.py.

Usage: ranks.py FOLDER KIND, where KIND is one, ddp or fsdp. It trains to the end, and once more in two parts, the
second of which goes on from a checkpoint; in every case of CASES. Rank 0 writes FOLDER/result.pt: by case the losses,
what moved in each step, and the digests of the weights and moments of both runs.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from finetune_api.hyperparameters import Hyperparameters
from finetune_api.strategy import Unfreezing
from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.checkpoints.gang import Alone, Ranks
from finetune_trainer.checkpoints.trainer import CheckpointingMixin
from finetune_trainer.groups import ParameterGroupsMixin, peak_rates
from finetune_trainer.learning import allow_pauses, learn
from finetune_trainer.progress import Reporter
from finetune_trainer.storage import Store
from finetune_trainer.unfreezing import UnfreezingCallback, stages
from tests.support.torchrun import leave

STEPS, EVERY = 6, 2
ROWS, LENGTH = 16, 12
CASES: dict[str, dict[str, Any]] = {
    "in the first stage": {"stop": 1},
    "at a boundary": {"stop": 2},
    "in the same process": {"stop": 3, "same": True},
    "in a later stage, recomputing, with accumulation": {"stop": 3, "recompute": True, "accumulate": 2},
}


class PlainTrainer(CheckpointingMixin, ParameterGroupsMixin, Trainer):
    """With our checkpoints, and whatever model and schedule a case has."""


def pretend_to_have_gpus() -> None:
    """Let accelerate shard on CPUs: it asks for GPUs, torch does not."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if named.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = named["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, from all ranks."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Watching(TrainerCallback):
    """Losses, and the names of the weights that each step moved; every rank asks, since shards are gathered."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.moved: list[list[str]] = []

    def on_step_begin(self, args, state, control, *, model, **_):
        self._before = {name: whole(parameter) for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, *, model, **_):
        self.moved.append(
            sorted(n for n, it in model.named_parameters() if not torch.equal(self._before[n], whole(it)))
        )

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self._step


def build(output: Path, kind: str, case: dict[str, Any]) -> PlainTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, use_cache=False, attention_dropout=case.get("dropout", 0.0),
    )  # fmt: skip
    accumulate, ranks = case.get("accumulate", 1), 1 if kind == "one" else 2
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                                             "state_dict_type": "SHARDED_STATE_DICT"}}  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=4 // ranks // accumulate,
        gradient_accumulation_steps=accumulate, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1,
        save_steps=1, logging_steps=1, report_to="none", use_cpu=True, seed=3, data_seed=5, disable_tqdm=True,
        max_grad_norm=1.0, activation_checkpointing=case.get("recompute", False),
        activation_checkpointing_kwargs={"use_reentrant": False}, **(sharded if kind == "fsdp" else {}),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if case.get("lora"):
        rank, dropout = case.get("r", 4), case.get("lora_dropout", 0.1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=rank, lora_dropout=dropout))
    trainer = PlainTrainer(model, arguments, train_dataset=rows())
    trainer.learning = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    trainer.checkpoints = checkpoints_in(output, arguments)
    values = Hyperparameters.from_wire({"learningRate": 1e-2, "layerDecay": 0.8})
    trainer.rates = peak_rates(model, trainer.learning, values)
    if case.get("lora"):
        return trainer
    options = Unfreezing.from_wire({"everySteps": EVERY})
    schedule = stages(model, trainer.learning, set(), options)
    trainer.add_callback(UnfreezingCallback(schedule, options, Reporter(rank=arguments.process_index)))
    allow_pauses(trainer)
    return trainer


def checkpoints_in(output: Path, arguments: TrainingArguments) -> Checkpoints:
    (output / "bucket").mkdir(parents=True, exist_ok=True)
    rank, size = arguments.process_index, arguments.world_size
    gang = Ranks(rank, size, range(size)) if size > 1 else Alone()
    identity = Manifest(step=0, job="tiny", uid="u", attempt=1, world_size=size, base_digest="b")
    root = f"file://{output}/bucket/checkpoints"
    # How many are kept is for the main rank to know.
    keep = partial({0: 100}.__getitem__, rank)
    return Checkpoints(Store.connect({}), root, identity, keep=keep, on_commit=lambda ref: None, gang=gang)


def digest(trainer: PlainTrainer) -> str:
    """Of weights and moments, those of all ranks."""
    found = hashlib.sha256()
    state = trainer.optimizer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        tensors = [parameter, *(value for _, value in sorted(state[parameter].items()) if torch.is_tensor(value))]
        found.update(name.encode() + b"".join(whole(tensor).contiguous().numpy().tobytes() for tensor in tensors))
    return found.hexdigest()


def scenario(folder: Path, kind: str, case: dict[str, Any]) -> dict[str, Any]:
    trainer, watching = build(folder / "whole", kind, case), Watching()
    trainer.add_callback(watching)
    trainer.train()
    trainer.checkpoints.close()
    result = {"losses": watching.losses, "moved": watching.moved, "undisturbed": digest(trainer)}
    stopped = build(folder / "parts", kind, case)
    stopped.add_callback(StopAt(case["stop"]))
    stopped.train()
    stopped.checkpoints.wait()
    if case.get("same"):
        # After a step that was not finite the same process goes on, whatever learns by then.
        resumed = stopped
        resumed.remove_callback(StopAt)
        learn(resumed.model, {"lm_head.weight"})
    else:
        resumed = build(folder / "parts", kind, case)
    checkpoint, where = resumed.checkpoints.restore(folder / "restored", print)
    assert checkpoint.step == case["stop"]
    resumed.train(resume_from_checkpoint=str(where))
    for used in {stopped.checkpoints, resumed.checkpoints}:
        used.close()
    return result | {"resumed": digest(resumed)}


def main() -> None:
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    if kind == "fsdp":
        pretend_to_have_gpus()
    results = {}
    for number, (name, case) in enumerate(CASES.items()):
        results[name] = scenario(folder / f"{kind}-{number}", kind, case)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(results, folder / f"{kind}.pt")
        shutil.rmtree(folder / f"{kind}-0", ignore_errors=True)
    leave()


if __name__ == "__main__":
    main()
