"""Tensors in parts: which part of a tensor this rank holds, and parts read back in any other division.

A file of parts is a safetensors file in the layout of torch.distributed.checkpoint (HuggingFaceStorageWriter with
save_distributed): its metadata says where in the whole tensor each part begins. torch can read such a folder too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

SHARDING_KEY = "DCP_SHARDING_INFO"
"""Where torch looks for the offsets of parts."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) of a part, in elements of the whole tensor."""


class IncompleteError(Exception):
    """Parts of a tensor are missing, or it has another shape."""


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor.

    Attributes:
        values: on whatever device, not copied.
        offset: where they begin in the whole tensor.
        shape: of the whole tensor.
    """

    values: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return tuple(self.values.shape) == self.shape


def box_of(tensor: torch.Tensor) -> Box:
    """The part of a tensor that lies on this rank."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor that lie on this rank; writing to them writes to the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensors: Mapping[str, torch.Tensor], is_main: bool) -> dict[str, Piece]:
    """What this rank has to save: its parts of sharded tensors; whole ones are saved by the main rank alone."""
    found = {}
    for name, tensor in tensors.items():
        offset, shape = box_of(tensor)
        if prod(shape) and (is_main or isinstance(tensor, DTensor)):
            found[name] = Piece(local(tensor), offset, tuple(tensor.shape))
    return found


def sharding_info(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """What the metadata of a file of parts says; nothing where all are whole."""
    if all(piece.is_whole for piece in pieces.values()):
        return {}
    info = {name: {"saved_offsets": piece.offset, "shape": piece.shape} for name, piece in pieces.items()}
    return {SHARDING_KEY: json.dumps(info)}


class _Part(NamedTuple):
    path: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Saved:
    """Tensors in safetensors files, whole or in parts, by their names."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._parts: defaultdict[str, list[_Part]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole tensors."""
        for path in sorted(paths):
            self._add(path)

    def _add(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get(SHARDING_KEY, "{}"))
            for name in sorted(file.keys()):
                shape = tuple(file.get_slice(name).get_shape())
                offset = tuple(info[name]["saved_offsets"]) if info else (0,) * len(shape)
                self._parts[name].append(_Part(path, offset, shape))
                self.shapes[name] = tuple(info[name]["shape"]) if info else shape

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A part of a tensor, put together from the parts that were saved, on the CPU.

        Raises:
            IncompleteError: not all of it is in these files.
        """
        for part in self._parts[name]:
            if (part.offset, part.shape) == (offset, shape):
                with safe_open(part.path, framework="pt") as file:
                    return file.get_tensor(name)
        return self._assemble(name, offset, shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor that is there."""
        with safe_open(self._parts[name][0].path, framework="pt") as file:
            # No row of it: only the file's beginning is read.
            dtype: torch.dtype = file.get_slice(name)[:0].dtype
            return dtype

    def _assemble(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        whole, found = None, 0
        for part in self._parts[name]:
            common = _common((offset, shape), (part.offset, part.shape))
            if common is None:
                continue
            with safe_open(part.path, framework="pt") as file:
                values = file.get_slice(name)[_slices(common, part.offset)]
            whole = torch.empty(shape, dtype=values.dtype) if whole is None else whole
            whole[_slices(common, offset)] = values
            found += values.numel()
        if whole is None or found != whole.numel():
            raise IncompleteError(name)
        return whole


def _common(one: Box, other: Box) -> Box | None:
    """What two parts have in common, or None."""
    begins = [max(a, b) for a, b in zip(one[0], other[0], strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True)]
    if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
        return None
    return tuple(begins), tuple(end - begin for begin, end in zip(begins, ends, strict=True))


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a part lies in an array whose first element is at `origin`."""
    return tuple(slice(begin - start, begin - start + count) for begin, count, start in zip(*box, origin, strict=True))
