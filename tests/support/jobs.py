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
from finetune_api.strategy import OWNERS
from finetune_trainer import train
from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.preemption import StopFlag
from finetune_trainer.progress import Reporter
from finetune_trainer.result import Output
from finetune_trainer.runtime import Context
from finetune_trainer.session import Session, Start
from finetune_trainer.storage import Store
from tests.support.models import greetings, save_tiny_llama


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rows_of(task: str) -> Iterable[dict[str, Any]]:
    """Rows that a tiny model can learn something from in a few steps."""
    match task:
        case "Instruction":
            return greetings(24)
        case "CausalLM":
            return ({"text": f"Row {n % 5}: the quick brown fox jumps over {n % 5} dogs."} for n in range(24))
        case "SequenceClassification":
            return ({"text": letters(n), "label": "abc"[n % 3]} for n in range(48))
        case "Regression":
            return ({"text": letters(n), "label": (-1.5, 0.5, 2.5)[n % 3]} for n in range(48))
        case "ImageClassification":
            return ()  # images lie in folders, see images.an_image_job
    raise ValueError(task)


def letters(number: int) -> str:
    """A text that is mostly made of one letter of three."""
    return "abc"[number % 3] * (5 + number % 7) + f" {number}"


HEADED = {"epochs": 10, "maxSteps": 24, "learningRate": 1e-2, "perDeviceBatchSize": 8}
"""What a head that begins at random needs to learn as much."""


def a_job(root: Path, strategy: str = "LoRA", task: str = "Instruction", /, **spec: Any) -> FineTuneJob:
    """A small job whose model, data and output lie under root.

    `spec` adds to the spec's parts, in the names of the YAML (options such as `lora` to strategy); None takes a field
    away. The model is written when it is not there yet.
    """
    model = root / "model"
    if not model.exists():
        save_tiny_llama(model)
    data = write_rows(root / "data" / f"{task}.jsonl", rows_of(task))
    wire: dict[str, Any] = {
        "task": {"type": task},
        "model": {"uri": f"file://{model}"},
        "dataset": {"uri": f"file://{data}", "validation": {"fraction": 0.2}},
        "strategy": {"type": strategy},
        "hyperparameters": {
            "epochs": 3,
            "maxSteps": 6,
            "learningRate": 5e-3,
            "perDeviceBatchSize": 4,
            "maxLength": 128,
            **(HEADED if task in ("SequenceClassification", "Regression") else {}),
        },
        "evaluation": {"samples": 1},
        "checkpoint": {"everySteps": 4},
        "output": {"uri": f"file://{root / 'out'}"},
    }
    wire["strategy"] |= {name: spec.pop(name) for name in OWNERS if name in spec}
    for part, fields in spec.items():
        wire[part] = {name: value for name, value in (wire.get(part, {}) | fields).items() if value is not None}
    return resolve(FineTuneJob.from_wire({"metadata": {"name": "tiny", "uid": "uid-1"}, "spec": wire}))


def a_context(job: FineTuneJob, scratch: Path, attempt: int = 1) -> Context:
    """The context of a single worker, without signals."""
    scratch.mkdir(parents=True, exist_ok=True)
    job_file = scratch / "job.json"
    job_file.write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    return Context(
        job=job,
        job_file=job_file,
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


def a_session(job: FineTuneJob, scratch: Path) -> Session:
    """Everything up to the first step, with real checkpoints in the job's output."""
    context, store = a_context(job, scratch), Store.connect({})
    start = Start.of(context, store, Output(store, job))
    base = start.fetch()
    session = start.open(base)
    identity = Manifest(step=0, job="tiny", uid="uid-1", attempt=1, world_size=1, base_digest=base.digest)
    root = f"{job.spec.output.uri}/checkpoints"
    session.trainer.checkpoints = Checkpoints(store, root, identity, keep=lambda: 3, on_commit=lambda ref: None)
    return session


def to_bucket(job: FineTuneJob, client: Any, bucket: str) -> FineTuneJob:
    """The same job with its model and data in a bucket under in/, and its output there under out/."""
    wire = job.to_wire()
    spec = wire["spec"]
    model, data = Path(spec["model"]["uri"][7:]), Path(spec["dataset"]["uri"][7:])
    for path in [*model.iterdir(), data]:
        client.upload_file(str(path), bucket, f"in/{path.name}")
    spec["model"]["uri"], spec["dataset"]["uri"] = f"s3://{bucket}/in", f"s3://{bucket}/in/*.jsonl"
    spec["output"]["uri"] = f"s3://{bucket}/out"
    return FineTuneJob.from_wire(wire)


def run(job: FineTuneJob, scratch: Path, attempt: int = 1, context: Context | None = None) -> Result:
    """Train a job in this process; what it left for the agent."""
    context = context or a_context(job, scratch, attempt)
    train.main(context)
    return Result.model_validate_json(context.result_file.read_text())
