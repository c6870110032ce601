"""What checkpoints cost: how long training waits for one, what its upload takes away, and the first batch of a resume.

The state is that of SmolLM2-135M: all of it with Adam's moments (Full), or LoRA of rank 8; the bucket is the embedded
S3 server on the same machine, which takes its share of the same cores. The reference saves and uploads the same state
before training goes on. On a quiet machine: `python -m bench.checkpoints [pairs]`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.support.jobs import a_session
from tests.support.models import save_smollm2
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from bench.common import interleaved, median, report
from bench.training import alike, job, write_rows
from bench.transfer import renew_bucket
from finetune_api import contract
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_operator.cluster.seaweed import Seaweed
from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.gathering import trainable_state
from finetune_trainer.storage import Store
from finetune_trainer.tasks.trainer import JobTrainer

EVERY = 20
BLOCKS = (True, False, True, True, False, False, True, True, False)
"""Whether a checkpoint is saved at the beginning of a block of EVERY steps; the first one warms up, and starts the
process that uploads."""
FULL_STEPS = 3
ROWS, POSITION, BATCH = 1_000_000, 200_000, 4
IDENTITY = Manifest(step=0, job="bench", uid="bench", attempt=1, world_size=1, base_digest="bench")
MIB = 1024 * 1024


class Steps(TrainerCallback):
    """Takes the time of every step, with what happens between two, and saves where it is told to."""

    def __init__(self, trainer: JobTrainer, blocks: tuple[bool, ...]) -> None:
        self._trainer, self._blocks = trainer, blocks
        self.began: list[float] = []
        self.blocked: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began.append(time.perf_counter())
        block, first = divmod(state.global_step, EVERY)
        if first == 0 and self._blocks[block]:
            self._trainer._save_checkpoint(self._trainer.model, None)
            self.blocked.append(time.perf_counter() - self.began[-1])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.began.append(time.perf_counter())

    def seconds(self, saved: bool) -> float:
        """A block's, with a checkpoint or without: each of its steps as it was in the median of such blocks."""
        steps = [after - before for before, after in zip(self.began, self.began[1:], strict=False)]
        starts = [number * EVERY for number, has in enumerate(self._blocks) if number and has is saved]
        return sum(median([steps[start + step] for start in starts]) for step in range(EVERY))


class Bench:
    """A bucket, a base model and its rows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = save_smollm2(folder / "model")
        # Else a block of steps takes longer than another since its rows are longer.
        self._data = write_rows(folder / "rows.jsonl", alike())

    def lora(self) -> None:
        """Training with a checkpoint in every second block of steps, on average, and without."""
        trainer = self._trainer("LoRA", len(BLOCKS) * EVERY)
        steps = Steps(trainer, BLOCKS)
        trainer.add_callback(steps)
        trainer.train()
        trainer.checkpoints.wait()
        used, size = uploader_seconds(trainer), state_bytes(trainer)
        trainer.checkpoints.close()
        saved, plain = steps.seconds(saved=True), steps.seconds(saved=False)
        report(
            f"checkpoints, slowdown of LoRA by one every {EVERY} steps",
            ratio=saved / plain - 1,
            target="< 0.02",
            blocked_share=median(steps.blocked) / plain,
            blocked_seconds=median(steps.blocked),
            uploader_processor_seconds=used / sum(BLOCKS),
            state_mib=size / MIB,
            step_seconds=plain / EVERY,
            blocks=len(BLOCKS) - 1,
        )

    def full(self, pairs: int) -> None:
        """How long training waits, against saving and uploading before it goes on."""
        trainer = self._trainer("Full", FULL_STEPS)
        steps = Steps(trainer, (False,))
        trainer.add_callback(steps)
        trainer.train()
        processor: list[float] = []

        def ours() -> float:
            began, used = time.perf_counter(), uploader_seconds(trainer)
            trainer._save_checkpoint(trainer.model, None)
            blocked = time.perf_counter() - began
            trainer.checkpoints.wait()
            processor.append(uploader_seconds(trainer) - used)
            return blocked

        first = ours()
        blocked, synchronous = interleaved(ours, lambda: self._synchronous(trainer), pairs, os.sync)
        size = state_bytes(trainer)
        trainer.checkpoints.close()
        plain = median([after - before for before, after in zip(steps.began[1:], steps.began[2:], strict=False)])
        report(
            "checkpoints, blocking time of Full",
            ratio=median(blocked) / median(synchronous),
            target="<= 0.06",
            blocked_seconds=median(blocked),
            first_blocked_seconds=first,
            synchronous_seconds=median(synchronous),
            state_mib=size / MIB,
            uploader_processor_seconds=median(processor),
            step_seconds=plain,
            blocked_share_of_steps=median(blocked) / (EVERY * plain),
            runs=pairs,
        )

    def _synchronous(self, trainer: JobTrainer) -> float:
        folder, store = self._folder / "synchronous", Store.connect(os.environ)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        began = time.perf_counter()
        save_file(trainable_state(trainer.model, trainer.learning), folder / "weights.safetensors")
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
        store.upload_folder(folder, "s3://bench/synchronous")
        seconds = time.perf_counter() - began
        store.close()
        return seconds

    def _trainer(self, strategy: str, steps: int) -> JobTrainer:
        folder = self._folder / strategy
        wire = job(self._model, self._data, folder / "out", rows=1)
        wire["spec"]["strategy"] = {"type": strategy}
        wire["spec"]["hyperparameters"] |= {"maxSteps": steps, "packing": False}
        trainer = a_session(resolve(FineTuneJob.from_wire(wire)), folder / "scratch").trainer
        trainer.args.save_strategy = "no"
        trainer.checkpoints = Checkpoints(
            Store.connect(os.environ), f"s3://bench/{strategy}", IDENTITY, keep=lambda: 1, on_commit=lambda ref: None
        )
        return trainer


def uploader_seconds(trainer: JobTrainer) -> float:
    """Processor time of the process that uploads, so far."""
    process = trainer.checkpoints._delivery.courier._process
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def state_bytes(trainer: JobTrainer) -> int:
    return sum(file.size for file in trainer.checkpoints._staging._files)


class Million(Dataset[dict[str, torch.Tensor]]):
    """So many rows, none of which is worth a look."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.full((8,), index % 64)
        return {"input_ids": ids, "labels": ids}


class FirstStep(TrainerCallback):
    """When the first batch was there."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at = time.perf_counter()


def seconds_to_first_batch(folder: Path, steps: int, resume: Path | None) -> float:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "output"), max_steps=steps, per_device_train_batch_size=BATCH, save_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer, first = JobTrainer(LlamaForCausalLM(config), arguments, train_dataset=Million()), FirstStep()
    trainer.learning = frozenset(name for name, _ in trainer.model.named_parameters())
    trainer.checkpoints = Checkpoints(
        Store.connect({}), f"file://{folder}/bucket", IDENTITY, keep=lambda: 1, on_commit=lambda ref: None
    )
    trainer.add_callback(first)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.checkpoints.close()
    return first.at - began


def resume(folder: Path, pairs: int) -> None:
    """The first batch of a run that goes on in the middle of a million rows, against that of a fresh one."""
    seconds_to_first_batch(folder, 1, None)
    middle = folder / "middle"
    shutil.copytree(folder / "bucket/step-00000001", middle)
    state = json.loads((middle / "trainer_state.json").read_text())
    (middle / "trainer_state.json").write_text(json.dumps(state | {"global_step": POSITION}))
    resumed, fresh = interleaved(
        lambda: seconds_to_first_batch(folder, POSITION + 1, middle),
        lambda: seconds_to_first_batch(folder, 1, None),
        pairs,
        lambda: shutil.rmtree(folder / "bucket", ignore_errors=True),
    )
    report(
        f"checkpoints, first batch of a resume at row {POSITION * BATCH:,} of {ROWS:,}",
        unit="s",
        later_than_fresh=median(resumed) - median(fresh),
        target="< 2",
        resumed=median(resumed),
        fresh=median(fresh),
        runs=pairs,
    )


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name, Seaweed() as seaweed:
        folder = Path(name)
        (folder / "s3").mkdir()
        server = seaweed.start(folder / "s3")
        os.environ |= {
            contract.ENV_S3_ENDPOINT: server.url,
            contract.ENV_S3_ACCESS_KEY_ID: server.access_key,
            contract.ENV_S3_SECRET_ACCESS_KEY: server.secret_key,
        }
        renew_bucket(server, "bench")
        resume(folder, pairs)
        bench = Bench(folder)
        bench.full(pairs)
        bench.lora()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
