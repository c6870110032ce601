"""The parameters as each rank holds them: sharded by torch itself, over a process group of which only one is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from finetune_trainer.estimate.figures import ROOT, Held
from finetune_trainer.structure import Structure

if TYPE_CHECKING:
    from finetune_trainer.estimate.sketch import Sketch

SCALED, SCALES_SCALED = 64, 256
"""Weights that share a scale, and scales that do (bitsandbytes/functional.py: quantize_4bit)."""
SCALE_MAPS = 4 * (16 + 256)
"""Bytes of the tables that a packed weight carries along: of the 4-bit numbers and of the 8-bit scales."""


class Storage(NamedTuple):
    """How a packed weight lies in memory."""

    shape: tuple[int, ...]
    extra: int


def held(sketch: Sketch, world_size: int) -> list[Held]:
    """All parameters on the fullest of so many ranks, sharded over them as FSDP2 does it. Uses the sketch up.

    For several ranks it takes a process without a process group.
    """
    storages = {name: _pack(sketch, name) for name in sketch.quantized}
    _replace_packed(sketch, storages)
    tables = _tables(sketch.model)
    if world_size == 1:
        return [_held(name, tensor, tables, storages, "") for name, tensor in sketch.model.named_parameters()]
    with fake_group(world_size):
        units = _shard(sketch.model, world_size)
        return [
            _held(name, tensor, tables, storages, units.get(id(tensor), ROOT))
            for name, tensor in sketch.model.named_parameters()
        ]


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """A process group of so many ranks, of which this is rank 0; what it is sent goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _shard(model: Any, world_size: int) -> dict[int, str]:
    """Shard as training does: each block for itself, and all else with the whole model.

    Returns the block of each of their parameters, by its identity.
    """
    mesh = init_device_mesh("cpu", (world_size,))
    units: dict[int, str] = {}
    for block in Structure.of(model).blocks:
        # By its name: what adapters have put into its place.
        module = model.get_submodule(block.name)
        fully_shard(module, mesh=mesh)
        units |= {id(parameter): block.name for parameter in module.parameters()}
    fully_shard(model, mesh=mesh)
    return units


def _held(name: str, tensor: nn.Parameter, tables: set[str], storages: dict[str, Storage], unit: str) -> Held:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    extra = storages[name].extra if name in storages else 0
    return Held(
        name=name,
        shape=tuple(local.shape),
        whole=tensor.numel(),
        itemsize=tensor.element_size(),
        learns=tensor.requires_grad,
        embedding=name in tables,
        unit=unit,
        extra=extra,
    )


def _tables(model: nn.Module) -> set[str]:
    """Names of the weights of all embeddings."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}


def _pack(sketch: Sketch, name: str) -> Storage:
    """Two numbers a byte, held as a column of the passes' precision so that it can be sharded; and its scales.

    Double quantisation holds the scales in 8 bits, and scales of them (Dettmers et al., 2023). Scales are not sharded:
    they hang on the weight, and every rank has all of them.
    """
    elements = sketch.model.get_parameter(name).numel()
    quantization = sketch.spec.strategy.quantization
    doubly = quantization is not None and quantization.double_quant
    scales = -(-elements // SCALED)
    size = scales + 4 * -(-scales // SCALES_SCALED) if doubly else 4 * scales
    return Storage((-(-elements // (2 * sketch.compute.itemsize)), 1), size + SCALE_MAPS)


def _replace_packed(sketch: Sketch, storages: dict[str, Storage]) -> None:
    for name, storage in storages.items():
        place, _, leaf = name.rpartition(".")
        packed = torch.empty(storage.shape, dtype=sketch.compute, device="meta")
        sketch.model.get_submodule(place)._parameters[leaf] = nn.Parameter(packed, requires_grad=False)


def unpacked(sketch: Sketch) -> int:
    """Bytes of the largest 4-bit weight in the precision of the passes: one at a time is unpacked."""
    sizes = (prod(sketch.model.get_parameter(name).shape) for name in sketch.quantized)
    return max(sizes, default=0) * sketch.compute.itemsize
