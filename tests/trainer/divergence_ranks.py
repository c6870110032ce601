"""Two processes of which one alone meets a step that is not finite; run by test_divergence_ranks.py.

Usage: divergence_ranks.py FOLDER KIND, where KIND is ddp, fsdp or scaled (ddp with loss scaling). Each rank writes
FOLDER/KIND-RANK.json: what it was told, and whether its weights are those from before the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from finetune_trainer.errors import DivergedError
from finetune_trainer.tasks.finite import FiniteStepsMixin
from tests.support.torchrun import leave
from tests.trainer.ranks import pretend_to_have_gpus, rows, whole

BAD_STEP, CULPRIT = 3, 1


class Exploding(FiniteStepsMixin, Trainer):
    """Multiplies one rank's loss by infinity in one step."""

    def compute_loss(self, *arguments, **named):
        loss = super().compute_loss(*arguments, **named)
        if self.state.global_step + 1 == BAD_STEP and self.args.process_index == CULPRIT:
            return loss * torch.inf
        return loss


class Keeping(TrainerCallback):
    def on_step_begin(self, args, state, control, *, model, **_):
        self.before = [whole(parameter) for parameter in model.parameters()]


def main() -> None:
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if kind == "fsdp":
        pretend_to_have_gpus()
    arguments = TrainingArguments(
        output_dir=str(folder / kind), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, **(sharded if kind == "fsdp" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    keeping = Keeping()
    trainer = Exploding(LlamaForCausalLM(config), arguments, train_dataset=rows(), callbacks=[keeping])
    if kind == "scaled":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    told = ""
    try:
        trainer.train()
    except DivergedError as error:
        told = error.message
    # Hangs, until the test gives up, where the ranks do not agree.
    kept = [torch.equal(old, whole(new)) for old, new in zip(keeping.before, trainer.model.parameters(), strict=True)]
    result = {"told": told, "kept": all(kept), "step": trainer.state.global_step}
    (folder / f"{kind}-{arguments.process_index}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main()
