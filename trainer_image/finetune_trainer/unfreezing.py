"""Gradual unfreezing: from the output to the input, more learns with every stage (Howard and Ruder, 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from finetune_api.contract import Stage
from finetune_api.strategy import Unfreezing
from finetune_trainer.errors import UsageError
from finetune_trainer.groups import what
from finetune_trainer.learning import allow_pauses, begin, learn
from finetune_trainer.selection import chosen
from finetune_trainer.structure import Structure

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from finetune_trainer.loaded import Loaded
    from finetune_trainer.progress import Reporter
    from finetune_trainer.tasks.trainer import JobTrainer

FIELD = "spec.strategy.unfreezing"
Names = frozenset[str]


def unfreeze(trainer: JobTrainer, loaded: Loaded, options: Unfreezing, reporter: Reporter) -> None:
    """Let what learns do so by and by; raises UsageError as `stages` does."""
    fresh = {name for name in trainer.learning if loaded.is_fresh(name)}
    schedule = stages(loaded.model, trainer.learning, fresh, options)
    trainer.add_callback(UnfreezingCallback(schedule, options, reporter))
    allow_pauses(trainer)


def stages(model: nn.Module, learning: Collection[str], fresh: Collection[str], options: Unfreezing) -> list[Names]:
    """What learns in each stage: the first one's parameters, those and the second one's, and so on.

    Args:
        learning: names of the parameters that ever learn; the last stage has them all.
        fresh: names of those that begin as random numbers; the first stage has them.

    Raises:
        UsageError: a stage that adds nothing, or nothing to unfreeze after the first stage.
    """
    structure = Structure.of(model)
    parts = (
        _named(structure, set(learning), set(fresh), options)
        if options.stages
        else _by_layers(structure, set(learning), set(fresh), options.layers_per_stage or 1)
    )
    if len(parts) == 1:
        raise UsageError(
            f"{FIELD}: there is only one stage, in which all learns that ever does: {what(structure, learning)}",
            "lower layersPerStage, name more stages, or remove unfreezing",
        )
    return list(accumulate(map(frozenset, parts), frozenset.union))


def _named(structure: Structure, learning: set[str], fresh: set[str], options: Unfreezing) -> list[set[str]]:
    left, parts = learning - fresh, []
    for index, part in enumerate(options.stages or ()):
        field = f"{FIELD}.stages[{index}]"
        added = chosen(structure, part, field) & left
        if not added and not (index == 0 and fresh):
            raise UsageError(
                f"{field}: nothing that learns begins with it",
                f"what is new to the model learns from the start; left is {what(structure, left)}",
            )
        left -= added
        parts.append(added)
    parts[0] |= fresh
    parts[-1] |= left
    return parts


def _by_layers(structure: Structure, learning: set[str], fresh: set[str], count: int) -> list[set[str]]:
    """After the blocks; so many blocks in which something learns; ...; before the blocks, with the last of them."""
    by_depth: dict[int, set[str]] = {}
    after = structure.layers + 1
    for name in learning:
        by_depth.setdefault(after if name in fresh else structure.places[name].depth, set()).add(name)
    head, blocks = by_depth.pop(after, set()), sorted(by_depth.keys() - {0}, reverse=True)
    parts = [set().union(*(by_depth[depth] for depth in some)) for some in _chunks(blocks, count)]
    parts = [part for part in [head, *parts] if part]
    parts[-1:] = [set().union(*parts[-1:], by_depth.get(0, set()))]
    return parts


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def starts(options: Unfreezing, count: int, steps_per_epoch: Callable[[], int]) -> list[int]:
    """How many steps have been taken when each of the stages begins, the first one with 0.

    Epochs count by the first step boundary after them.

    Args:
        steps_per_epoch: asked only where epochs are given, since a stream has none.
    """
    every = options.every_steps or (options.every_epochs or 0) * steps_per_epoch()
    # Rounded first: three times a tenth is more than three tenths.
    return [math.ceil(round(stage * every, 6)) for stage in range(count)]


def stage_at(step: int, begun: Sequence[int]) -> int:
    """The stage of the step that comes after so many."""
    return sum(start <= step for start in begun) - 1


class UnfreezingCallback(TrainerCallback):
    """Lets learn what the stage says, which follows from the number of steps alone."""

    def __init__(self, stages: Sequence[Names], options: Unfreezing, reporter: Reporter) -> None:
        self._stages, self._options, self._reporter = stages, options, reporter
        self._starts: list[int] = []
        self._stage = -1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: DataLoader[Any],
        **_: Any,
    ) -> None:
        def per_epoch() -> int:
            return math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)

        self._starts = starts(self._options, len(self._stages), per_epoch)
        self._warn(state.max_steps)
        inner: Optimizer = optimizer.optimizer
        begin(model, inner, self._stages[-1])
        self._enter(stage_at(state.global_step, self._starts), model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        stage = stage_at(state.global_step, self._starts)
        if stage != self._stage:
            self._enter(stage, model)

    def _enter(self, stage: int, model: nn.Module) -> None:
        self._stage = stage
        learn(model, self._stages[stage])
        self._reporter.stage(Stage.TRAINING, f"unfreezing: stage {stage + 1} of {len(self._stages)}")

    def _warn(self, last_step: int) -> None:
        late = [number for number, start in enumerate(self._starts) if start >= last_step]
        if late:
            self._reporter.warn(
                f"{FIELD}: stage {late[0] + 1} of {len(self._starts)} begins after step {self._starts[late[0]]}, but "
                f"training ends with step {last_step}: what it adds never learns; train longer, or make stages shorter "
                "or larger"
            )
