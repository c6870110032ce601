"""Files that exist in memory only: tensors are copied there in a moment, and uploaded while training goes on.

Each is an anonymous file of the kernel (memfd), so that neither a disk nor the size of /dev/shm bounds it; it counts as
the pod's memory. Its content is a safetensors file to the byte.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from finetune_trainer.checkpoints.manifest import TENSORS_SUFFIX
from finetune_trainer.checkpoints.pieces import Piece, held, sharding_info
from finetune_trainer.checkpoints.uploader import Held
from finetune_trainer.errors import OutOfMemoryError
from finetune_trainer.layout import lay_out, size_of
from finetune_trainer.memory import available_bytes

GIB = 1024**3
FILES = 4
"""Weights and optimizer, each whole and in parts."""


class MemoryFile:
    """One such file; what it takes is kept for the next checkpoint, which then need not ask the kernel for pages."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name)
        self.size = 0
        self._map: mmap.mmap | None = None

    def write(self, pieces: Mapping[str, Piece]) -> None:
        """Replace the content by these tensors."""
        found = {name: piece.values for name, piece in pieces.items()}
        header, places = lay_out(found, sharding_info(pieces))
        self._resize(len(header) + sum(map(size_of, found.values())))
        assert self._map is not None
        self._map[: len(header)] = header
        for name, values in found.items():
            if values.numel():
                target = torch.frombuffer(self._map, dtype=values.dtype, count=values.numel(), offset=places[name])
                target.view(values.shape).copy_(values)

    def _resize(self, size: int) -> None:
        if size != self.size:
            # Whoever still had the old one keeps it; there is nobody: one checkpoint is in flight at most.
            self._map = None
            os.ftruncate(self.fd, size)
            self._map, self.size = mmap.mmap(self.fd, size), size

    def close(self) -> None:
        """Give the memory back."""
        self._map = None
        os.close(self.fd)


class Staging:
    """The files of one rank's state, in memory.

    Args:
        ranks: of this machine, all of which stage at the same time.
    """

    def __init__(self, rank: int, size: int, ranks: int) -> None:
        self._rank, self._size, self._ranks = rank, size, ranks
        self._files: list[MemoryFile] = []

    @property
    def descriptors(self) -> list[int]:
        """Of the files, which stay the same however large they become."""
        return [file.fd for file in self._files]

    def stage(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> list[Held]:
        """Copy what this rank has to save, in the place of what was staged before; where it lies.

        Args:
            state: tensors by their names, by the name of their file without its ending.

        Raises:
            OutOfMemoryError: there is no room.
        """
        parts = [part for name, tensors in state.items() for part in self._divided(name, tensors)]
        if parts and not self._files:
            self._files = [MemoryFile(f"checkpoint-{number}") for number in range(FILES)]
        needed = sum(size_of(piece.values) for _, pieces in parts for piece in pieces.values())
        require_memory(needed, sum(file.size for file in self._files), self._ranks)
        for (_, pieces), file in zip(parts, self._files, strict=False):
            file.write(pieces)
        return [
            held_file.model_copy(update={"path": f"/proc/self/fd/{file.fd}"})
            for (held_file, _), file in zip(parts, self._files, strict=False)
        ]

    def _divided(self, name: str, tensors: Mapping[str, torch.Tensor]) -> list[tuple[Held, dict[str, Piece]]]:
        """What is whole, and apart from it what is only this rank's part."""
        pieces = held(tensors, is_main=self._rank == 0)
        part = {key: piece for key, piece in pieces.items() if isinstance(tensors[key], DTensor)}
        whole = {key: piece for key, piece in pieces.items() if key not in part}
        own = f"{name}-{self._rank:05d}-of-{self._size:05d}{TENSORS_SUFFIX}"
        named = [
            (Held(name=f"{name}{TENSORS_SUFFIX}", path=""), whole),
            (Held(name=own, path="", rank=self._rank), part),
        ]
        return [(held_file, pieces) for held_file, pieces in named if pieces]

    def close(self) -> None:
        """Give the memory back."""
        while self._files:
            self._files.pop().close()


def require_memory(needed_bytes: int, has_bytes: int, ranks: int) -> None:
    """Refuse what cannot fit before the kernel kills somebody for it.

    Args:
        needed_bytes: of this rank.
        has_bytes: what this rank has staged files of already.
        ranks: on this machine; all of them are about to ask for as much.

    Raises:
        OutOfMemoryError: with what to ask for.
    """
    missing, free = (needed_bytes - has_bytes) * ranks, available_bytes()
    if free is not None and missing > free:
        raise OutOfMemoryError(
            f"checkpoints are staged in memory: {missing / GIB:.1f} GiB are needed, {free / GIB:.1f} are free",
            f"raise resources.memory by {(missing - free) / GIB:.1f} GiB, or train fewer parameters",
        )
