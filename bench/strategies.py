"""Every strategy on two real models, beside Full in the same run: peak memory, what learns, seconds a step.

SmolLM2-135M answers instructions, MiniLM classifies texts; the same rows, batch and length for all strategies, each in
a process of its own, in turns. Memory is the peak of the resident set from the first step to the last, which is what
decides whether a job fits; weights that are only read count as well. `python -m bench.strategies [rounds]` prints the
figures; with `--pictures FOLDER` it draws them too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import median, report
from bench.pictures import Bars, bar_chart
from bench.training import ENVIRON, ROOT, rows
from finetune_api.job import TaskType
from finetune_api.pairs import ALLOWED
from finetune_api.strategy import StrategyType

STEPS = 6
OPTIONS: dict[StrategyType, dict[str, Any]] = {
    StrategyType.PARTIAL: {"select": {"layers": {"last": 2}}},
    StrategyType.GREEN: {"green": {"target": 0.5}},
}
"""What must be said, or says what is measured; the rest are defaults."""
HEAD_ALONE: dict[str, Any] = {"additive": {"blocks": 0}}
"""All that can be added to BERT: behind its normalisation no block begins as the identity."""
MODELS = {"SmolLM2-135M": TaskType.INSTRUCTION, "MiniLM": TaskType.SEQUENCE_CLASSIFICATION}
FIGURES = {"memory": "peak memory", "seconds": "seconds a step"}


def job(strategy: StrategyType, task: TaskType, folder: Path) -> dict[str, Any]:
    """Six steps of four rows, the same for all strategies."""
    name = "smollm2" if task is TaskType.INSTRUCTION else "minilm"
    options = OPTIONS.get(strategy, {})
    if strategy is StrategyType.ADDITIVE and name == "minilm":
        options = HEAD_ALONE
    return {
        "metadata": {"name": "bench", "uid": "bench"},
        "spec": {
            "task": {"type": task.value},
            "model": {"uri": f"file://{folder / name}"},
            "dataset": {"uri": f"file://{folder / name}.jsonl"},
            "strategy": {"type": strategy.value, **options},
            "hyperparameters": {"maxSteps": STEPS, "perDeviceBatchSize": 4, "maxLength": 128},
            "evaluation": {"samples": 0},
            "checkpoint": {"everySteps": 10_000},
            "output": {"uri": f"file://{folder / 'out'}"},
        },
    }


def measured(strategy: StrategyType, task: TaskType, folder: Path) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "bench.strategies", "--one", json.dumps(job(strategy, task, folder))]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRON, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{strategy.value} for {task.value}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one(wire: dict[str, Any]) -> dict[str, float]:
    """Train in this process: peak bytes, median seconds of the steps after the first, share that learns."""
    from tests.support.jobs import a_session
    from transformers import TrainerCallback

    from finetune_api.defaults import resolve
    from finetune_api.job import FineTuneJob

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as scratch:
        session = a_session(resolve(FineTuneJob.from_wire(wire)), Path(scratch))
        stopwatch = Stopwatch()
        session.trainer.add_callback(stopwatch)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        session.trainer.train()
        lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    steps = [after - before for before, after in zip(stopwatch.times, stopwatch.times[1:], strict=False)]
    trainable, total = session.parameters
    return {"memory": peak, "seconds": median(steps), "trainable": trainable, "share": trainable / total}


def write_inputs(folder: Path) -> None:
    """Both models and their rows."""
    from tests.support.models import save_minilm, save_smollm2

    save_smollm2(folder / "smollm2")
    save_minilm(folder / "minilm")
    pairs = rows()
    labelled = [{"text": row["completion"], "label": "odd" if len(row["prompt"]) % 2 else "even"} for row in pairs]
    for name, part in (("smollm2", pairs), ("minilm", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def compare(task: TaskType, folder: Path, rounds: int) -> dict[StrategyType, dict[str, float]]:
    """Medians of every strategy that the task has; in turns, so that what else happens hits all alike."""
    strategies = [strategy for strategy, allowed in ALLOWED if allowed is task]
    found: dict[StrategyType, list[dict[str, float]]] = {strategy: [] for strategy in strategies}
    for _ in range(rounds):
        for strategy in strategies:
            found[strategy].append(measured(strategy, task, folder))
    return {
        strategy: {name: median([run[name] for run in runs]) for name in runs[0]} for strategy, runs in found.items()
    }


def main(models: list[str], rounds: int, pictures: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for model in models:
            task = MODELS[model]
            figures = compare(task, folder, rounds)
            whole = figures[StrategyType.FULL]
            for strategy, found in figures.items():
                report(
                    f"{strategy.value} on {model}",
                    trainable=int(found["trainable"]),
                    share=found["share"],
                    memory_mib=round(found["memory"] / 2**20),
                    memory_ratio=found["memory"] / whole["memory"],
                    step_seconds=found["seconds"],
                    step_ratio=found["seconds"] / whole["seconds"],
                    runs=rounds,
                )
            if pictures is not None:
                bars = [
                    Bars(title, {s.value: found[key] / whole[key] for s, found in figures.items()})
                    for key, title in FIGURES.items()
                ]
                (pictures / f"strategies-{model.lower()}.svg").write_text(
                    bar_chart(f"{model}: relative to Full", bars), "utf-8"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--model", action="append", choices=list(MODELS), dest="models")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(json.loads(options.one))))
    else:
        main(options.models or list(MODELS), options.rounds, options.pictures)
