"""Two processes (or one) that train a tiny model on a stream; run by test_streaming.py.

Usage: stream_ranks.py FOLDER START STOP, where FOLDER holds the files under data/. It goes on from FOLDER's checkpoint
of step START, if that is not 0, and ends after step STOP of STEPS; the global batch is BATCH whatever the number of
processes. Rank 0 prints the losses of its steps and the epochs behind, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForTokenClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from finetune_api.job import DatasetSpec, TaskType
from finetune_trainer.data import order
from finetune_trainer.data.preparation import prepare
from finetune_trainer.inputs import StoredFile
from finetune_trainer.storage import Store
from finetune_trainer.tasks.streaming import StreamCallback, StreamingMixin
from tests.data import tokenizers
from tests.support.torchrun import leave

STEPS, BATCH = 8, 4


class StreamingTrainer(StreamingMixin, Trainer):
    """With the library's own checkpoints, which know ranks."""


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self._step


def build(folder: Path, ranks: int) -> StreamingTrainer:
    torch.manual_seed(0)
    tokenizer, store = tokenizers.chatml(), Store.connect({})
    tokenizer.pad_token = tokenizer.eos_token
    uri = f"file://{folder}/data/"
    spec = DatasetSpec.from_wire({"uri": uri, "streaming": True, "onInvalidRow": "Drop"})
    files: list[Any] = [StoredFile(store, info) for info in store.list(uri)]
    options = {"max_length": 24, "seed": 5, "scratch": folder / "scratch"}
    prepared = prepare(files, spec, TaskType.CAUSAL_LM, tokenizer, **options)
    arguments = Arguments(
        output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH // ranks, save_steps=1,
        learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, seed=3, disable_tqdm=True,
        ignore_data_skip=True, restore_callback_states_from_checkpoint=True, remove_unused_columns=False,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return StreamingTrainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=prepared.train,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        callbacks=[StreamCallback()],
    )


def main(folder: Path, start: int, stop: int) -> None:
    torch.set_num_threads(1)
    order.WINDOW_ROWS = 5
    trainer = build(folder, int(os.environ.get("WORLD_SIZE", "1")))
    trainer.add_callback(StopAfter(stop))
    trainer.train(resume_from_checkpoint=str(folder / f"out/checkpoint-{start}") if start else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][start:]
    if trainer.args.process_index == 0:
        print(json.dumps({"losses": losses, "epoch": trainer.state.epoch}), flush=True)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
