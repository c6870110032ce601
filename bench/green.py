"""Green at target 0.5 against Full: operations of a step as torch counts them, seconds of a step, loss.

Both fine-tune SmolLM2-135M on the same rows with the same settings, in turns, each through our trainer. The backward
pass of the last step is counted by torch's FLOP counter, which knows nothing of Green's own model of costs. On a quiet
machine: `python -m bench.green [pairs]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.support.jobs import a_session
from tests.support.models import save_smollm2
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

from bench.common import interleaved, median, report
from bench.training import rows
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_trainer.strategies.green.operations import UNCOUNTED

STEPS, TARGET, EVERY = 12, 0.5, 100
"""EVERY is the default of strategy.green.everySteps; the first choice is the only one in so few steps."""


class Figures(NamedTuple):
    seconds: float
    """Median of a step."""
    choosing: float
    """Seconds before the first step; about 0 for Full."""
    forward: int
    backward: int
    """FLOPs of the last step."""
    before: float
    loss: float
    """On held-out rows, before and after training."""


class Watch(TrainerCallback):
    """Takes the time of every step, and counts the operations of the last one."""

    def __init__(self, trainer: Trainer) -> None:
        self.seconds: list[float] = []
        self.choosing = 0.0
        self.forward = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        self.backward = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        self._trainer, self._since = trainer, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.choosing = time.perf_counter() - self._since
        if state.global_step == STEPS - 1:
            self._count()
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)

    def _count(self) -> None:
        trainer = self._trainer
        compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

        def counted_loss(*arguments: Any, **named: Any) -> Any:
            with self.forward:
                return compute_loss(*arguments, **named)

        def counted_backward(*arguments: Any, **named: Any) -> None:
            with self.backward:
                backward(*arguments, **named)

        trainer.compute_loss, trainer.accelerator.backward = counted_loss, counted_backward


def job(strategy: dict[str, Any], model: Path, data: Path, out: Path) -> FineTuneJob:
    """Twelve steps of four rows at a constant rate, with held-out rows."""
    spec = {
        "task": {"type": "Instruction"},
        "model": {"uri": f"file://{model}"},
        "dataset": {"uri": f"file://{data}", "validation": {"fraction": 0.08}},
        "strategy": strategy,
        "hyperparameters": {
            "maxSteps": STEPS,
            "perDeviceBatchSize": 4,
            "learningRate": 2e-5,
            "scheduler": "constant",
            "warmupRatio": 0,
            "maxLength": 128,
            "gradientCheckpointing": False,
            "packing": False,
        },
        "evaluation": {"samples": 0},
        "checkpoint": {"everySteps": 10_000},
        "output": {"uri": f"file://{out}"},
    }
    return resolve(FineTuneJob.from_wire({"metadata": {"name": "bench", "uid": "bench"}, "spec": spec}))


def figures(strategy: dict[str, Any], model: Path, data: Path) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        trainer = a_session(job(strategy, model, data, Path(name) / "out"), Path(name)).trainer
        watch = Watch(trainer)
        trainer.add_callback(watch)
        # Not what is measured here: a checkpoint of the last step.
        trainer.args.save_strategy = "no"
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    operations = watch.forward.get_total_flops(), watch.backward.get_total_flops()
    # Without the step that was counted, and the first one.
    return Figures(median(watch.seconds[1:-1]), watch.choosing, *operations, before, loss)


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    strategies = [{"type": "Green", "green": {"target": TARGET, "everySteps": EVERY}}, {"type": "Full"}]
    found: list[list[Figures]] = [[], []]
    with tempfile.TemporaryDirectory() as name:
        model, data = save_smollm2(Path(name) / "model"), Path(name) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()))

        def one(side: int) -> float:
            found[side].append(figures(strategies[side], model, data))
            return found[side][-1].seconds

        interleaved(lambda: one(0), lambda: one(1), pairs, lambda: None)
    green, full = found
    mine, theirs = green[0], full[0]
    report("Green: backward operations of a step", unit="FLOPs", ratio=mine.backward / theirs.backward,
           target="<= 0.55", green=mine.backward, full=theirs.backward)  # fmt: skip
    report("Green: operations of a step", unit="FLOPs", target=f"<= {TARGET}",
           ratio=(mine.forward + mine.backward) / (theirs.forward + theirs.backward))  # fmt: skip
    step, whole = median([f.seconds for f in green]), median([f.seconds for f in full])
    choosing = median([f.choosing for f in green])
    report("Green: a step with its share of choosing", unit="s", ratio=(step + choosing / EVERY) / whole, target="< 1",
           green=step, full=whole, choosing=choosing, every=EVERY, runs=pairs)  # fmt: skip
    report("Green: held-out loss", unit="nats", ratio=mine.loss / theirs.loss, green=mine.loss, full=theirs.loss,
           before=theirs.before, steps=STEPS)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
