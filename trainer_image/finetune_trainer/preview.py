"""`python -m finetune_trainer.preview JOB FOLDER`: what a job will train, told from the model's config.json alone.

JOB is a resolved job.json, FOLDER holds config.json (and the code beside it, where that is trusted). The model is built
without weights, so that a 70B model takes no more memory than a small one. Prints a Preview as JSON.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from finetune_api.common import Message
from finetune_api.job import FineTuneJobSpec
from finetune_api.selection import ModuleKind
from finetune_trainer.answer import answer
from finetune_trainer.estimate.sketch import Sketch, without_measures
from finetune_trainer.model import parameter_counts
from finetune_trainer.runtime import load_job
from finetune_trainer.structure import Place, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEFT_PREFIX = "base_model.model."


class Learning(Message):
    """Modules of one name in one or several blocks, or one outside of them."""

    module: str = Field(description="Its name; in its block, where it lies in one.")
    kind: ModuleKind | None
    layers: str | None = Field(description="Numbers of the blocks, such as 0-3, 8; null outside of the blocks.")
    parameters: int


class Preview(Message):
    """What will train."""

    trainable: int
    total: int
    share: float
    modules: list[Learning]
    notes: list[str] = Field(description="What is decided only when data and weights are there.")


def preview(spec: FineTuneJobSpec, folder: Path) -> Preview:
    """What the job of a resolved spec will train.

    Raises:
        UsageError: the spec names what the architecture does not have.
    """
    sketch = Sketch.of(spec, folder, torch.float32)
    loaded, model = sketch.loaded, sketch.model
    _, notes = without_measures(spec.strategy)
    if loaded.fresh:
        notes.append(f"{', '.join(loaded.fresh)} counts as new; a head that answers just what is asked is kept")
    trainable, total = parameter_counts(model)
    fisher = spec.strategy.select.fisher if spec.strategy.select else None
    if fisher is not None:
        named = model.named_parameters()
        new = sum(parameter.numel() for name, parameter in named if loaded.is_fresh(name))
        trainable = new + round((trainable - new) * fisher.fraction)
    return Preview(trainable=trainable, total=total, share=trainable / total, modules=learning(model), notes=notes)


def learning(model: PreTrainedModel) -> list[Learning]:
    """What learns, alike modules of several blocks together, in the order of the model."""
    structure = Structure.of(model)
    blocks = {block.layer: block.name for block in structure.blocks}
    layers: defaultdict[tuple[str, ModuleKind | None, bool], set[int]] = defaultdict(set)
    sizes: defaultdict[tuple[str, ModuleKind | None, bool], int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = structure.places[name]
            key = (_module(name, place, blocks), place.kind, place.layer is not None)
            layers[key] |= {place.layer} if place.layer is not None else set()
            sizes[key] += parameter.numel()
    return [
        Learning(module=key[0], kind=key[1], layers=ranges(layers[key]) if key[2] else None, parameters=size)
        for key, size in sizes.items()
    ]


def _module(name: str, place: Place, blocks: dict[int, str]) -> str:
    within = name.removeprefix(f"{blocks[place.layer]}.") if place.layer is not None else name
    within = within.removeprefix(PEFT_PREFIX)
    return within.rpartition(".")[0].removesuffix(".default") or within


def ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> 0-2, 5."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def main(arguments: list[str] | None = None) -> int:
    """Print the preview; the exit code is the contract's, 0 for success."""
    job, folder = arguments if arguments is not None else sys.argv[1:]
    return answer(lambda: preview(load_job(Path(job)).spec, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
