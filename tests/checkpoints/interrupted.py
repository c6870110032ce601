"""A training run that is killed and resumed, in processes of its own; run by test_resume.py.

Usage: interrupted.py FOLDER SCENARIOS where SCENARIOS is JSON: name -> list of kills, each `step:N` (SIGKILL as soon as
step N is done), `upload:N` (SIGKILL while the checkpoint of step N is on its way) or `none` (it runs to its end). The
run is started again after each, and at last runs to its end. Prints for each scenario the SHA-256 of the final weights
and the step from which the last start went on, as JSON. One process for all: importing the libraries takes longest.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.checkpoints.trainer import CheckpointingMixin
from finetune_trainer.storage import Store

STEPS, EVERY = 11, 3
"""Neither a multiple of the other nor of the epoch's 7 steps: a resume falls into the middle of things."""


class CheckpointingTrainer(CheckpointingMixin, Trainer):
    pass


class Killer(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 64, (28, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def build(output: Path) -> CheckpointingTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        attention_dropout=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=0.2, save_steps=EVERY, logging_steps=1,
        report_to="none", use_cpu=True, seed=3, data_seed=5, disable_tqdm=True, save_total_limit=None,
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    trainer = CheckpointingTrainer(LlamaForCausalLM(config), arguments, train_dataset=rows())
    trainer.learning = frozenset(name for name, _ in trainer.model.named_parameters())
    return trainer


def run(
    root: str, scratch: Path, attempt: int, arm: Callable[[CheckpointingTrainer], object] = lambda trainer: None
) -> tuple[int, str]:
    """One start of the worker; the step it went on from and the digest of the weights at its end.

    Args:
        arm: prepares what is to happen to the trainer.
    """
    identity = Manifest(step=0, job="ml/tiny", uid="u", attempt=attempt, world_size=1, base_digest="b")
    with Store.connect(os.environ) as store:
        checkpoints = Checkpoints(store, root, identity, keep=lambda: 2, on_commit=lambda ref: None)
        with closing(checkpoints):
            found = checkpoints.restore(scratch / "restored", lambda text: print(text, file=sys.stderr))
            trainer = build(scratch / "output")
            trainer.checkpoints = checkpoints
            arm(trainer)
            trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return (found[0].step if found else 0), digest.hexdigest()


def arm(trainer: CheckpointingTrainer, kill: str) -> None:
    if kill == "none":
        return
    moment, step = kill.split(":")
    if moment == "step":
        trainer.add_callback(Killer(int(step)))
        return
    submit = trainer.checkpoints.submit

    def submit_and_die(at: int, *rest: object) -> None:
        submit(at, *rest)
        if at == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.checkpoints.submit = submit_and_die


def in_child(root: str, scratch: Path, attempt: int, kill: str) -> tuple[int, str] | None:
    """Run in a forked process, as it is killed whole; None when it was."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        result = run(root, scratch, attempt, lambda trainer: arm(trainer, kill))
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert bool(text) == (os.waitstatus_to_exitcode(status) == 0)
    assert text or os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return tuple(json.loads(text)) if text else None


def scenario(folder: Path, kills: list[str]) -> dict[str, object]:
    (folder / "bucket").mkdir(parents=True)
    root = f"file://{folder}/bucket/checkpoints"
    for attempt, kill in enumerate([*kills, "none"], start=1):
        ended = in_child(root, folder / "scratch", attempt, kill)
        assert (ended is not None) == (kill == "none"), f"{kill} did not happen"
    return {"resumed_from": ended[0], "digest": ended[1]}


def main() -> None:
    # Children are forked: no thread of torch's may exist before.
    torch.set_num_threads(1)
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps({name: scenario(folder / name, kills) for name, kills in scenarios.items()}))


if __name__ == "__main__":
    main()
