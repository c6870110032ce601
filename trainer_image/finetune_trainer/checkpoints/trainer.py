"""What the Hugging Face trainers lack: saving only what learns, by all ranks together, and handing it to the bucket.

Everything else of theirs serves as it is: scheduler, scaler, generators, callbacks and the data position are written
and read by the Trainer itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_utils import IntervalStrategy

from finetune_trainer.checkpoints import optimizer_state
from finetune_trainer.checkpoints.checkpoints import Checkpoints
from finetune_trainer.checkpoints.generators import load_generators, save_generators
from finetune_trainer.checkpoints.pieces import IncompleteError, Saved, box_of, local
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.course import LOSS, Watch
from finetune_trainer.gathering import trainable_state
from finetune_trainer.learning import learn, let_go, plainly_named
from finetune_trainer.storage.files import require_room

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

WEIGHTS, OPTIMIZER = "trainable", "optimizer"
"""Names of the files of tensors, without what follows: their part and `.safetensors`."""
OPTIMIZER_REST_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
ALLOWED_FILES = {OPTIMIZER_REST_FILE, SCHEDULER_FILE, "scaler.pt", "rng.safetensors", "trainer_state.json"}
"""Nothing else leaves the pod: above all not training_args.bin, a pickle that may hold tokens."""
SMALL_BYTES = 64 * 1024 * 1024
"""More than all files together ever take that are not staged in memory."""


def load_trainable_state(model: nn.Module, learning: Collection[str], paths: Sequence[Path]) -> None:
    """Copy the tensors of a checkpoint into the model, in place; of sharded ones the parts of this rank.

    Args:
        paths: all files of the weights, or at least those that hold this rank's parts.

    Raises:
        UsageError: names or shapes differ: the checkpoint belongs to another model or strategy.
    """
    current, saved = trainable_state(model, learning), Saved(paths)
    boxes = {name: box for name, tensor in current.items() if prod((box := box_of(tensor))[1])}
    different = sorted(boxes.keys() - saved.shapes.keys() | saved.shapes.keys() - current.keys())
    different += [name for name, shape in saved.shapes.items() if name in current and current[name].shape != shape]
    if different:
        raise _misfit(different)
    with torch.no_grad():
        for name, box in boxes.items():
            local(current[name]).copy_(saved.read(name, *box))


def _misfit(different: Sequence[str]) -> UsageError:
    return UsageError(
        f"the checkpoint does not fit what is trained: {len(different)} tensors differ ({different[0]}, ...)",
        "use another output.uri, or the model and strategy that the checkpoint was made with",
    )


class CheckpointingMixin(_Base):
    """Mix in before a Trainer class; give `checkpoints` and `learning` after construction."""

    checkpoints: Checkpoints
    learning: frozenset[str]
    """Names of the parameters that ever learn, whether they do so now or not."""
    watch: Watch | None = None
    """By what a step is the best one, whose checkpoint is kept; None: none is kept for that."""

    @property
    def best_step(self) -> int | None:
        """The step with the best evaluation so far; None where that does not count, or is not known yet."""
        best = self.watch.best(self.state.log_history) if self.watch else None
        return best.step if best else None

    def take_weights(self, paths: Sequence[Path]) -> None:
        """Put the weights of a checkpoint, all its WEIGHTS files, into the model in place of those that it has."""
        load_trainable_state(self.accelerator.unwrap_model(self.model), self.learning, paths)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The one before may still be read from the same folder, and what it failed with ends the run here.
        self.checkpoints.wait()
        # An evaluation leaves some of it gathered, which the optimizer does not know.
        let_go(self.model)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        require_room(folder, SMALL_BYTES)
        super()._save_checkpoint(model, trial)
        for path in folder.iterdir():
            if path.name not in ALLOWED_FILES:
                path.unlink()
        weights = trainable_state(self.accelerator.unwrap_model(self.model), self.learning)
        moments, _ = optimizer_state.split(self.optimizer, self._names())
        self.checkpoints.submit(self.state.global_step, folder, {WEIGHTS: weights, OPTIMIZER: moments}, self.best_step)

    def _get_output_dir(self, trial: Any) -> str:
        # Ranks of one machine share the scratch folder.
        return f"{super()._get_output_dir(trial)}/rank-{self.args.process_index}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: checkpoints take what learns from the model itself, and exports have their own function."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            _, rest = optimizer_state.split(self.optimizer, self._names())
            torch.save(rest, Path(output_dir) / OPTIMIZER_REST_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_generators(self.checkpoints.gang, Path(output_dir))

    def _names(self) -> dict[nn.Parameter, str]:
        model = self.accelerator.unwrap_model(self.model)
        return {parameter: name for name, parameter in plainly_named(model)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        load_trainable_state(target, self.learning, sorted(Path(resume_from_checkpoint).glob(f"{WEIGHTS}*")))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        # Whoever pauses some of it does so again when training begins.
        learn(self.model, self.learning)
        folder = Path(checkpoint)
        saved = Saved(folder.glob(f"{OPTIMIZER}*.safetensors"))
        rest = torch.load(folder / OPTIMIZER_REST_FILE, weights_only=True)
        try:
            state = optimizer_state.join(self.optimizer, self._names(), saved, rest)
        except (IncompleteError, KeyError) as error:
            raise _misfit([f"{OPTIMIZER}: {error}"]) from error
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            scratch = Path(self._get_output_dir(None)) / "restored"
            load_generators(self.checkpoints.gang, Path(checkpoint), scratch, self.args.seed + self.state.global_step)
            super()._load_rng_state(str(scratch))

    def _run_epoch(self, **arguments: Any) -> None:
        if self._owes_evaluation():
            self._evaluate(trial=None, ignore_keys_for_eval=None)
        # Resumed from the last step: the library would train one step more before it looks at the count.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _owes_evaluation(self) -> bool:
        """Whether the stop of an earlier attempt left out the evaluation of the step that this one goes on from.

        Without it a run that was stopped might take another step for the best than one that was not.
        """
        state, step = self.state, self.state.global_step
        if self.args.eval_strategy != IntervalStrategy.STEPS or step == 0:
            return False
        due = step % state.eval_steps == 0 or step >= state.max_steps
        return due and not any(entry["step"] == step and LOSS in entry for entry in state.log_history)
