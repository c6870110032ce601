"""`finetune plan --simulate`: memory, traffic and checkpoints of a job on so many GPUs, asked of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_operator.cli.trainer import Question, UnknownError

TRAINER_ESTIMATE = "finetune_trainer.estimate"
GIB = 2**30
PARTS = ("parameters", "gradients", "optimizer", "activations", "temporary", "total", "needs")


def what_it_takes(question: Question, world_sizes: Sequence[int]) -> Iterator[str]:
    """A line for each number of GPUs, the job's own first, and what to change where it does not fit."""
    try:
        found = question.ask(TRAINER_ESTIMATE, *map(str, world_sizes))
    except UnknownError as error:
        yield f"what it takes is not known: {error}"
        return
    yield "simulated from the model's shapes alone, GiB on the fullest GPU; nothing was run:"
    yield _row("GPUs", "sharding", PARTS, "rows", "sent")
    for estimate, rows in zip(found["estimates"], found["rowsPerStep"], strict=True):
        memory = [_gib(estimate["memory"][part]) for part in PARTS]
        sent = _gib(estimate["traffic"]["total"])
        yield _row(str(estimate["worldSize"]), estimate["sharding"], memory, f"{rows:,}", sent)
    yield from _remarks(question, found)


def _row(gpus: str, sharding: str, memory: Sequence[str], rows: str, sent: str) -> str:
    columns = "".join(f"{part:>12}" for part in memory)
    return f"{gpus:>6} {sharding:<8}{columns}{rows:>9}{sent:>9}"


def _remarks(question: Question, found: Mapping[str, Any]) -> Iterator[str]:
    own = found["estimates"][0]
    yield "needs: what a GPU must have, a tenth of it to spare; rows: per optimizer step; sent: by each GPU in a step"
    checkpoint = own["checkpoint"]
    yield (
        f"a checkpoint has {_gib(checkpoint['total'])} GiB ({_gib(checkpoint['weights'])} of weights that learn, "
        f"{_gib(checkpoint['optimizer'])} of moments)"
    )
    if own["host"]:
        yield f"{_gib(own['host'])} GiB per GPU lie in host memory"
    if own["guessed"]:
        yield "activations are a rule of thumb: no step of this architecture could be tried without numbers"
    product, size = question.job.spec.resources.gpu_product, found.get("gpuMemory")
    if size is None:
        known = f"nothing is known of {product}" if product else "resources.gpuProduct is not set"
        yield f"whether it fits is not known: {known}"
    elif own["memory"]["needs"] <= size:
        yield f"fits into {product} with {_gib(size)} GiB"
    else:
        yield f"does not fit into {product} with {_gib(size)} GiB: {found['advice']}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
