"""Chooses what learns at the start of every interval of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from finetune_trainer.learning import begin, learn, plainly_named
from finetune_trainer.strategies.green.costs import Costs, Mask
from finetune_trainer.strategies.green.importance import Step, importance
from finetune_trainer.strategies.green.meter import measure
from finetune_trainer.strategies.green.selection import affordable, budget_of, select
from finetune_trainer.strategies.green.undo import unseen

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from finetune_api.strategy import GreenOptions


class GreenSelection(TrainerCallback, ExportableState):
    """What learns in the interval that began with step `since`; a checkpoint carries it.

    The Trainer puts another one in its place when it loads a checkpoint, so it is looked up, never kept.
    """

    def __init__(self, names: list[str] | None = None, since: int = 0) -> None:
        self.names = names
        self.since = since

    def state(self) -> dict[str, Any]:
        return {"args": {"names": self.names, "since": self.since}, "attributes": {}}

    def is_due(self, step: int, every: int) -> bool:
        """Whether an interval begins with this step and nothing has been chosen for it."""
        return self.names is None or (step % every == 0 and step != self.since)


class Choosing(TrainerCallback):
    """Measures, probes and chooses between two steps, on the data of the second.

    Args:
        always: names of parameters that learn in any case.
    """

    def __init__(self, trainer: Trainer, options: GreenOptions, always: frozenset[str]) -> None:
        self._trainer = trainer
        self._options = options
        self._always = always
        self._step = Step([], None)

    def watch(self) -> None:
        """See the data of every step before the step is taken."""
        fetch = self._trainer.get_batch_samples

        def fetch_and_keep(*arguments: Any, **named: Any) -> Any:
            self._step = Step(*fetch(*arguments, **named))
            return self._step

        self._trainer.get_batch_samples = fetch_and_keep  # type: ignore[method-assign]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        model = self._trainer.model
        begin(model, self._trainer.optimizer.optimizer, {name for name, _ in plainly_named(model)})
        names = self._selection.names
        if names is not None:
            learn(model, frozenset(names))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        selection = self._selection
        if selection.is_due(state.global_step, self._options.every_steps):
            selection.names, selection.since = self._choose(), state.global_step
            learn(self._trainer.model, frozenset(selection.names))
        self._step = Step([], None)

    @property
    def _selection(self) -> GreenSelection:
        callbacks = self._trainer.callback_handler.callbacks
        return next(it for it in callbacks if isinstance(it, GreenSelection))

    def _choose(self) -> list[str]:
        """Names of what learns from now on; leaves no trace but in the log."""
        with unseen(self._trainer):
            costs = _from_first_rank(measure(self._trainer.model, self._loss))
            always = np.array([name in self._always for name in costs.names])
            budget = budget_of(costs, self._options.target)
            candidates = affordable(costs, budget, always)
            learn(self._trainer.model, set(_names(costs, candidates)) | self._always)
            gains = importance(self._trainer, self._step)
        chosen = select(costs, np.array([gains.get(name, 0.0) for name in costs.names]), budget, always)
        self._tell(costs, candidates, chosen)
        return [*_names(costs, chosen), *sorted(self._always - set(costs.names))]

    def _loss(self) -> Tensor:
        trainer = self._trainer
        trainer.model.train()
        inputs = trainer._prepare_inputs(self._step.batches[0])
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=self._step.items)

    def _tell(self, costs: Costs, candidates: Mask, chosen: Mask) -> None:
        """Log the share of Full's operations that the steps take from now on, and what choosing has cost in such steps.

        Two steps of the candidates, and a forward pass to measure.
        """
        probe = 2 * costs.share(candidates) + costs.forward / costs.full
        # Past TRL's own, which would give out and forget the averages of the steps so far.
        Trainer.log(
            self._trainer,
            {"green_share": costs.share(chosen), "green_tensors": int(chosen.sum()), "green_probe": probe},
        )


def _names(costs: Costs, mask: Mask) -> list[str]:
    return [name for name, is_in in zip(costs.names, mask, strict=True) if is_in]


def _from_first_rank(costs: Costs) -> Costs:
    """The first rank's, whose batch stands for all: others differ in length, and all must choose the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return costs
    shared = [costs]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
