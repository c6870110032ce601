"""The states of all random generators of all ranks in one file."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import set_seed

from finetune_trainer.checkpoints.gang import Gang

FILE = "rng.safetensors"


def save_generators(gang: Gang, folder: Path) -> None:
    """Let the main rank write, beside its other files, what the Trainer has written on every rank; a collective."""
    path = folder / _name(gang)
    states = gang.gather(path.read_bytes())
    path.unlink()
    if gang.rank == 0:
        save_file({str(rank): _tensor(state) for rank, state in enumerate(states)}, folder / FILE)


def load_generators(gang: Gang, folder: Path, scratch: Path, seed: int) -> None:
    """Write into scratch what the Trainer reads to put this rank's generators back.

    Where the ranks were others than now nothing could be the same: then each gets a seed of its own, and scratch stays
    empty.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with safe_open(folder / FILE, framework="pt") as file:
        if len(file.keys()) == gang.size:
            (scratch / _name(gang)).write_bytes(file.get_tensor(str(gang.rank)).numpy().tobytes())
            return
    digest = hashlib.sha256(f"{seed}/{gang.size}/{gang.rank}".encode()).digest()
    set_seed(int.from_bytes(digest[:4], "big"))


def _name(gang: Gang) -> str:
    """What the Trainer calls the file."""
    return "rng_state.pth" if gang.size == 1 else f"rng_state_{gang.rank}.pth"


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
