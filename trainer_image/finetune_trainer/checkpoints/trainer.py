"""What the Hugging Face trainers lack: saving only what learns, and handing the folder to the bucket.

Everything else of theirs serves as it is: optimizer, scheduler, scaler, generators, callbacks and the data position are
written and read by the Trainer itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import IntervalStrategy

from finetune_trainer.checkpoints.checkpoints import Checkpoints
from finetune_trainer.collectives import all_say, meet
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.course import LOSS, Watch
from finetune_trainer.gathering import gathered, gathered_optimizer, is_sharded, put, spread_optimizer, trainable_state

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

WEIGHTS_FILE = "trainable.safetensors"
RNG_FILE = "rng_state_{rank}.pth"
"""Of each rank, as the Trainer calls it; of a rank that is alone without a number."""
ALLOWED_FILES = re.compile(
    r"(trainable\.safetensors|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|trainer_state\.json)"
)
"""Nothing else leaves the pod: above all not training_args.bin, a pickle that may hold tokens."""


def load_trainable_state(model: nn.Module, learning: Collection[str], path: Path) -> None:
    """Copy the tensors of a checkpoint into the model, in place.

    Raises:
        UsageError: names or shapes differ: the checkpoint belongs to another model or strategy.
    """
    current, saved = trainable_state(model, learning), load_file(path)
    different = sorted(set(current) ^ set(saved)) or sorted(n for n in current if current[n].shape != saved[n].shape)
    if different:
        raise UsageError(
            f"the checkpoint does not fit what is trained: {len(different)} tensors differ ({different[0]}, ...)",
            "use another output.uri, or the model and strategy that the checkpoint was made with",
        )
    for name, tensor in current.items():
        put(tensor, saved[name])


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

    def take_weights(self, path: Path) -> None:
        """Put the weights of a checkpoint, its WEIGHTS_FILE, into the model in place of those that it has."""
        load_trainable_state(self.accelerator.unwrap_model(self.model), self.learning, path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what learns, and only that, on rank 0; exports have their own function."""
        state = gathered(trainable_state(self.accelerator.unwrap_model(self.model), self.learning))
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.raise_failure()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.local_process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
        meet()
        crc = torch.serialization.get_crc32_options()
        # The manifest carries a SHA-256 of every file; torch's own CRC would double the time that training waits.
        torch.serialization.set_crc32_options(False)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            torch.serialization.set_crc32_options(crc)
        if not self.args.should_save:
            return
        for path in folder.iterdir():
            if not ALLOWED_FILES.fullmatch(path.name):
                path.unlink()
        self.checkpoints.submit(self.state.global_step, folder, self.best_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Moments are saved whole, so that what was sharded can go on replicated, and the other way round."""
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gathered_optimizer(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(spread_optimizer(state, parameters))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Each rank has its own generators, and rank 0 hands those of all to the bucket."""
        super()._save_rng_state(output_dir)
        if self.args.world_size == 1:
            return
        own = Path(output_dir) / RNG_FILE.format(rank=self.args.process_index)
        states = all_say(own.read_bytes())
        if self.args.should_save:
            for rank, state in enumerate(states):
                (Path(output_dir) / RNG_FILE.format(rank=rank)).write_bytes(state)
        elif self.args.local_process_index == 0:
            # A node that hands over nothing keeps nothing.
            shutil.rmtree(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        load_trainable_state(target, self.learning, Path(resume_from_checkpoint) / WEIGHTS_FILE)

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
