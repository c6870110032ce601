"""What happens at every step beside the step itself: progress, the answer to SIGTERM, judging evaluations."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from finetune_api.contract import Stage
from finetune_trainer.evaluation.course import Watch, parted, why_to_stop

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from finetune_api.evaluation import EarlyStopping
    from finetune_trainer.preemption import StopFlag
    from finetune_trainer.progress import Reporter


class ProgressCallback(TrainerCallback):
    """Tells the reporter how far the training is."""

    def __init__(self, reporter: Reporter, metrics: tuple[str, ...]) -> None:
        self._reporter, self._metrics = reporter, metrics

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reporter.stage(Stage.TRAINING)
        self._reporter.update(step=state.global_step, total_steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reporter.beat()
        # Nothing is counted where rows are no tokens.
        tokens = state.num_input_tokens_seen or None
        self._reporter.update(step=state.global_step, epoch=state.epoch, tokens=tokens)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reporter.beat()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._reporter.beat()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._reporter.update(
                loss=logs["loss"], learning_rate=logs.get("learning_rate"), grad_norm=logs.get("grad_norm")
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        known = {name: value for name, value in (metrics or {}).items() if name in self._metrics}
        self._reporter.update(metrics=known)


class StopCallback(TrainerCallback):
    """Ends the training at the first step boundary after SIGTERM, with a checkpoint; all ranks at the same step."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._stop.agreed():
            control.should_evaluate = False
            self._end(control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # An evaluation may outlast the grace period; it is broken off and the step before it saved.
        if self._stop.agreed():
            self._end(control)

    def _end(self, control: TrainerControl) -> None:
        self.stopped = True
        control.should_save = True
        control.should_training_stop = True


WAY_OUT = (
    "it learns by heart; fewer epochs, evaluation.earlyStopping, hyperparameters.dropout or weightDecay, or more data "
    "help"
)


class CourseCallback(TrainerCallback):
    """After every evaluation: a checkpoint if it is the best so far, the end if patience is over, a warning if due.

    All of it follows from the log of the run, so nothing has to be kept.

    Args:
        watch: what makes a step the best; None: no checkpoint is due for that.
        early: when to stop; None: never.
    """

    def __init__(self, reporter: Reporter, watch: Watch | None, early: EarlyStopping | None) -> None:
        self._reporter, self._watch, self._early = reporter, watch, early
        self._training = self._warned = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = True
        # What stopped early may have been killed before it had delivered.
        self._stop_early(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._training:
            return
        best = self._watch.best(state.log_history) if self._watch else None
        if best is not None and best.step == state.global_step:
            control.should_save = True
        self._stop_early(state, control)
        self._warn(state)

    def _stop_early(self, state: TrainerState, control: TrainerControl) -> None:
        why = why_to_stop(state.log_history, self._early) if self._early else ""
        if why:
            self._reporter.stage(Stage.TRAINING, f"stopped early: {why}")
            control.should_save = True
            control.should_training_stop = True

    def _warn(self, state: TrainerState) -> None:
        how = "" if self._warned else parted(state.log_history)
        if how:
            self._warned = True
            self._reporter.warn(f"{how}: {WAY_OUT}")


class StopwatchCallback(TrainerCallback, ExportableState):
    """Counts the seconds of training over all attempts; a checkpoint carries the sum."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._since: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        self.seconds += now - (self._since or now)
        self._since = now

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}


def trained_seconds(trainer: Trainer) -> float:
    """Seconds of training over all attempts; the trainer replaces its callbacks when it loads a checkpoint."""
    return sum(it.seconds for it in trainer.callback_handler.callbacks if isinstance(it, StopwatchCallback))
