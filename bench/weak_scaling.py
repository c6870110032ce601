"""Weak scaling: what two processes do in the time in which one does half of it, ours and a plain torchrun of TRL.

LoRA of SmolLM2-135M with the same rows a process, over gloo, one thread a process; each run in new processes, in turns.
The efficiency is the speed of two over twice that of one. Needs two cores: on a quiet machine,
`python -m bench.weak_scaling [rounds]`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.support.models import save_smollm2

from bench.common import median, report
from bench.training import Figures, alike, ours, plain, write_rows

ROWS = 2
"""A process and step: what travels between the processes is the same for all."""
SIDES = {"ours": ours, "plain_trl": plain}


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data, work = save_smollm2(folder / "model"), write_rows(folder / "rows.jsonl", alike()), folder / "work"

        def one(side: str, processes: int) -> Figures:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            return SIDES[side](work, model, data, processes, ROWS)

        one("plain_trl", 1)  # the first run of all reads the libraries from disk
        turns = [(side, processes) for side in SIDES for processes in (1, 2)]
        speeds: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
        for number in range(rounds):
            for turn in turns if number % 2 == 0 else reversed(turns):
                speeds[turn].append(one(*turn).speed)
    found = {turn: median(figures) for turn, figures in speeds.items()}
    efficiency = {side: found[side, 2] / (2 * found[side, 1]) for side in SIDES}
    report(
        "weak scaling on 2 processes, LoRA of SmolLM2-135M",
        ratio=efficiency["ours"] / efficiency["plain_trl"],
        target=">= 1.0",
        **{f"{side}_efficiency": figure for side, figure in efficiency.items()},
        **{f"{side}_tokens_per_second_{processes}": speed for (side, processes), speed in found.items()},
        runs=rounds,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
