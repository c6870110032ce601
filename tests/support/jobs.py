"""Jobs over local folders, and the context that a worker gets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_api.contract import Result
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_trainer import train
from finetune_trainer.preemption import StopFlag
from finetune_trainer.progress import Reporter
from finetune_trainer.runtime import Context
from tests.support.models import greetings, save_tiny_llama


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def a_job(root: Path, strategy: str = "LoRA", task: str = "Instruction", **spec: Any) -> FineTuneJob:
    """A small job whose model, data and output lie under root; `spec` replaces or adds parts of its spec.

    The model is written when it is not there yet; hyperparameters are added to the small ones, not put in their place.
    """
    model = root / "model"
    if not model.exists():
        save_tiny_llama(model)
    rows: Iterable[dict[str, Any]] = greetings(24)
    if task == "CausalLM":
        rows = (
            {"text": f"Row {number % 5}: the quick brown fox jumps over {number % 5} dogs."} for number in range(24)
        )
    data = write_rows(root / "data" / f"{task}.jsonl", rows)
    small = {"maxSteps": 6, "learningRate": 5e-3, "perDeviceBatchSize": 4, "maxLength": 128}
    values = small | spec.pop("hyperparameters", {})
    wire: dict[str, Any] = {
        "task": {"type": task},
        "model": {"uri": f"file://{model}"},
        "dataset": {"uri": f"file://{data}", "validation": {"fraction": 0.2}},
        "strategy": {"type": strategy},
        "hyperparameters": {"epochs": 3} | values,
        "evaluation": {"samples": 1},
        "checkpoint": {"everySteps": 4},
        "output": {"uri": f"file://{root / 'out'}"},
    }
    return resolve(FineTuneJob.from_wire({"metadata": {"name": "tiny", "uid": "uid-1"}, "spec": wire | spec}))


def a_context(job: FineTuneJob, scratch: Path, attempt: int = 1) -> Context:
    """The context of a single worker, without signals."""
    scratch.mkdir(parents=True, exist_ok=True)
    return Context(
        job=job,
        attempt=attempt,
        rank=0,
        local_rank=0,
        world_size=1,
        node_rank=0,
        scratch=scratch,
        stop=StopFlag(60),
        reporter=Reporter(attempt),
        started_at=time.time(),
    )


def run(job: FineTuneJob, scratch: Path, attempt: int = 1) -> Result:
    """Train a job in this process, and what it left for the agent."""
    context = a_context(job, scratch, attempt)
    train.main(context)
    return Result.model_validate_json(context.result_file.read_text())
