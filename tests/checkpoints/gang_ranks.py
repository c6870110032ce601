"""Two ranks that save and resume together while this and that goes wrong; run by test_gang.py.

Usage: gang_ranks.py FOLDER KIND, where KIND is ddp or fsdp. FOLDER/alone and FOLDER/alone-rows hold what one process
has saved by then. Rank 0 writes FOLDER/result.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.support.torchrun import leave
from tests.trainer.ranks import PlainTrainer, StopAt, build, digest, pretend_to_have_gpus

from finetune_trainer.errors import TrainerError

STOP = 4
RANDOM: dict[str, Any] = {"dropout": 0.2}
LORA: dict[str, Any] = {"lora": True, "dropout": 0.2}
SINGLE_ROWS: dict[str, Any] = {"lora": True, "r": 1, "lora_dropout": 0.0}
"""Half of the adapters' matrices have one row: in shards the second rank holds nothing of them."""
CALM: dict[str, Any] = {}


def train(output: Path, kind: str, case: dict[str, Any], stop: int | None = None) -> PlainTrainer:
    """From the newest checkpoint there, if there is one; `restored` tells from which step, `warnings` what was said."""
    trainer, trainer.warnings = build(output, kind, case), []
    found = trainer.checkpoints.restore(output / "restored", trainer.warnings.append)
    trainer.restored = found[0].step if found else 0
    if stop:
        trainer.add_callback(StopAt(stop))
    try:
        trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
    finally:
        trainer.checkpoints.close()
    return trainer


def by_first_rank(act: Any) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def resumed(folder: Path, kind: str, case: dict[str, Any], corrupt: str = "") -> dict[str, Any]:
    """A run that is stopped and goes on, beside one that is not."""
    undisturbed = digest(train(folder / "whole", kind, case))
    train(folder / "parts", kind, case, STOP)
    if corrupt:
        by_first_rank(lambda: flip(folder / f"parts/bucket/checkpoints/step-{STOP:08d}/{corrupt}"))
    again = train(folder / "parts", kind, case)
    return {
        "from": again.restored,
        "warnings": again.warnings,
        "same": digest(again) == undisturbed,
        "files": sorted(path.name for path in (folder / "whole/bucket/checkpoints/step-00000006").iterdir()),
    }


def refused(folder: Path, kind: str, file: str) -> list[str]:
    """What the ranks say when the file of one of them cannot be written in step 2."""
    blocked = folder / f"bucket/checkpoints/step-00000002/{file}"
    by_first_rank(lambda: blocked.mkdir(parents=True))
    said = ""
    try:
        train(folder, kind, CALM)
    except TrainerError as error:
        said = error.message
    found: list[str] = ["", ""]
    dist.all_gather_object(found, said)
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    if kind == "fsdp":
        pretend_to_have_gpus()
    part = "-00001-of-00002" if kind == "fsdp" else ""
    results = {
        "random": resumed(folder / "random", kind, RANDOM, f"optimizer{part}.safetensors"),
        "lora": resumed(folder / "lora", kind, LORA),
        "single rows": resumed(folder / "rows", kind, SINGLE_ROWS),
        "from one process": train(folder / "alone", kind, CALM).restored,
        "single rows from one process": train(folder / "alone-rows", kind, SINGLE_ROWS).restored,
        "refused": refused(folder / "refused", kind, f"trainable{part}.safetensors"),
    }
    train(folder / "together", kind, CALM, STOP)
    train(folder / "together-rows", kind, SINGLE_ROWS, STOP)
    by_first_rank(lambda: (folder / "result.json").write_text(json.dumps(results)))
    leave()


if __name__ == "__main__":
    main()
