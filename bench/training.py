"""Our trainer against a plain TRL script: tokens a second, and process start to first optimizer step.

Both train the same LoRA of SmolLM2-135M on the same rows with the same settings, each in a new process, in turns. Ours
goes the whole way of a pod: launch, agent, worker, progress server; checkpoints are off on both sides. On a quiet
machine: `python -m bench.training [pairs]`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.models import save_smollm2

from bench.common import interleaved, median, report
from finetune_api import contract

ROOT = Path(__file__).parents[1]
STEPS = 6
ROWS = 400
BATCH = 4
WORDS = (
    "the",
    "operator",
    "trains",
    "a",
    "model",
    "on",
    "rows",
    "of",
    "text",
    "and",
    "writes",
    "what",
    "it",
    "learned",
)
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator", "trainer_image"))
ENVIRON = {
    **os.environ,
    "PYTHONPATH": PATHS,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # One thread on both sides: two that wait for each other measure whatever else runs on a shared machine.
    "OMP_NUM_THREADS": "1",
}
ADDRESS = "127.0.0.9"
"""Of its own on loopback, so that the progress port is free."""


class Figures(NamedTuple):
    first_step: float
    """Seconds from the start of the process to the end of the first optimizer step."""
    speed: float
    """Tokens a second, from the beginning of the training to the end of its last step."""


def rows() -> list[dict[str, str]]:
    """Prompts and completions of different lengths."""
    return [
        {
            "prompt": f"Question {n}: " + " ".join(WORDS[i % len(WORDS)] for i in range(n, n + 8 + n % 23)) + "?\n",
            "completion": " ".join(WORDS[(i * 5) % len(WORDS)] for i in range(n, n + 20 + n % 61)) + ".",
        }
        for n in range(ROWS)
    ]


def alike() -> list[dict[str, str]]:
    """Rows of one length, so that no batch takes longer than another."""
    first = rows()[0]
    return [{**first, "prompt": first["prompt"].replace("Question 0", f"Question {100 + n}")} for n in range(ROWS)]


def write_rows(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def job(model: Path, data: Path, out: Path, rows: int = BATCH) -> dict[str, Any]:
    """The job that does what bench/plain_trl.py does, with so many rows a process."""
    return {
        "metadata": {"name": "bench", "uid": "bench"},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": f"file://{model}"},
            "dataset": {"uri": f"file://{data}"},
            "strategy": {"type": "LoRA", "lora": {"rank": 8, "alpha": 16, "dropout": 0.05}},
            "hyperparameters": {"maxSteps": STEPS, "perDeviceBatchSize": rows, "learningRate": 2e-4, "maxLength": 256},
            "evaluation": {"samples": 0},
            "checkpoint": {"everySteps": 10_000},
            "output": {"uri": f"file://{out}"},
        },
    }


def plain(folder: Path, model: Path, data: Path, processes: int = 1, rows: int = BATCH) -> Figures:
    """TRL's script; several processes by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [ROOT / "bench/plain_trl.py", model, data, folder / "plain", STEPS, rows]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, script)]
    # A cache of its own in every run: both sides prepare the rows each time.
    first, output = run(command, "first step", ENVIRON | {"HF_DATASETS_CACHE": str(folder / "cache")})
    done = json.loads(next(line for line in reversed(output) if line.startswith('{"tokens"')))
    return Figures(first, done["tokens"] / done["seconds"])


def ours(folder: Path, model: Path, data: Path, processes: int = 1, rows: int = BATCH) -> Figures:
    """A pod with so many processes."""
    wire = job(model, data, folder / "out", rows)
    wire["spec"]["resources"] = {"processesPerNode": processes}
    (folder / "job.json").write_text(json.dumps(wire))
    environ = ENVIRON | {
        contract.ENV_NNODES: "1",
        contract.ENV_NPROC_PER_NODE: str(processes),
        contract.ENV_NODE_RANK: "0",
        contract.ENV_MASTER_ADDR: ADDRESS,
        contract.ENV_JOB_FILE: str(folder / "job.json"),
        contract.ENV_SCRATCH_DIR: str(folder / "scratch"),
        contract.ENV_TERMINATION_LOG: str(folder / "termination"),
        contract.ENV_POD_IP: ADDRESS,
    }
    first, _ = run([sys.executable, "-m", "finetune_trainer.launch"], f"step 1/{STEPS} ", environ)
    result = json.loads((folder / "out/result.json").read_text())
    return Figures(first, result["tokens"] / result["trainSeconds"])


def run(command: list[str], first: str, environ: dict[str, str]) -> tuple[float, list[str]]:
    """Seconds until a line with `first` was printed, and all lines."""
    began, seconds, lines = time.monotonic(), None, []
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if seconds is None and first in line:
            seconds = time.monotonic() - began
    if process.wait() or seconds is None:
        raise RuntimeError("".join(lines[-30:]))
    return seconds, lines


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, work = save_smollm2(folder / "model"), folder / "work"
        data = write_rows(folder / "rows.jsonl", rows())
        figures: dict[str, list[Figures]] = {"ours": [], "plain": []}

        def fresh() -> None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()

        def one(side: str) -> float:
            figures[side].append((ours if side == "ours" else plain)(work, model, data))
            return figures[side][-1].speed

        one_ours, one_plain = (lambda: one("ours")), (lambda: one("plain"))
        fresh()
        plain(work, model, data)  # the first run of all reads the libraries from disk
        interleaved(one_ours, one_plain, pairs, fresh)
    mine, theirs = ([f.speed for f in figures[side]] for side in ("ours", "plain"))
    report("training throughput", unit="tokens/s", ratio=median(mine) / median(theirs), target=">= 0.98",
           ours=median(mine), plain_trl=median(theirs), runs=pairs)  # fmt: skip
    mine, theirs = ([f.first_step for f in figures[side]] for side in ("ours", "plain"))
    report("process start to first step", unit="s", ratio=median(mine) / median(theirs), target="<= 1.15",
           ours=median(mine), plain_trl=median(theirs), runs=pairs)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
