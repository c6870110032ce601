"""The same training as a short script over TRL: what bench/training.py and bench/weak_scaling.py compare with.

Usage: plain_trl.py MODEL_FOLDER DATA_JSONL OUTPUT_FOLDER STEPS ROWS, alone or by torchrun; ROWS are those of a batch of
one process. Prints `first step` when the first optimizer step is done, and at the end a line of JSON with tokens and
seconds of training.
"""

from __future__ import annotations

import json
import os
import sys
import time

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Stopwatch(TrainerCallback):
    """From the beginning of the training to the end of its last step."""

    def on_train_begin(self, args, state, control, **_):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        self.ended = time.monotonic()
        if state.global_step == 1:
            print("first step", flush=True)


def main(model: str, data: str, output: str, steps: str, rows: str) -> None:
    arguments = SFTConfig(
        output_dir=output,
        max_steps=int(steps),
        per_device_train_batch_size=int(rows),
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_length=256,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        logging_steps=1,
        save_strategy="no",
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        seed=42,
    )
    stopwatch = Stopwatch()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"
        ),
        callbacks=[stopwatch],
    )
    trainer.train()
    seconds = stopwatch.ended - stopwatch.began
    if trainer.is_world_process_zero():
        print(json.dumps({"tokens": trainer.state.num_input_tokens_seen, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
