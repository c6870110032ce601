"""What a single module is: a norm, a linear layer, a wrapper around one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

WRAPPED = ("base_layer", "original_module")
"""Under these names PEFT's layers keep the module whose place they have taken."""
CONTAINERS = (nn.ModuleList, nn.Sequential)


class Part(NamedTuple):
    """A module and its name as in named_modules()."""

    name: str
    module: nn.Module


def children(part: Part) -> Iterator[Part]:
    """The direct children that have parameters, in order of registration."""
    for name, child in part.module.named_children():
        if next(child.parameters(), None) is not None:
            yield Part(f"{part.name}.{name}" if part.name else name, child)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that PEFT's wrappers, if there are any, stand for."""
    for name in WRAPPED:
        inner = module._modules.get(name)
        if inner is not None:
            return unwrapped(inner)
    return module


def is_simple(module: nn.Module) -> bool:
    """Whether it is one layer (linear, convolution, norm, embedding...), with or without an adapter on it."""
    inner = unwrapped(module)
    return not any(True for _ in children(Part("", inner)))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises over the rows of a batch; such norms hold running statistics."""
    inner = unwrapped(module)
    return isinstance(inner, nn.modules.batchnorm._NormBase) or "BatchNorm" in type(inner).__name__


def is_layer_norm(module: nn.Module) -> bool:
    """Whether it normalises every row for itself: LayerNorm and its kin, by class or by a class name ending in Norm."""
    inner = unwrapped(module)
    named = isinstance(inner, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or type(inner).__name__.endswith("Norm")
    return named and is_simple(inner) and not is_batch_norm(inner)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is one of torch's convolutions."""
    return isinstance(unwrapped(module), nn.modules.conv._ConvNd)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: also one of bitsandbytes, and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(unwrapped(module), nn.Linear | Conv1D)


def widths(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    inner: Any = unwrapped(linear)
    return (inner.in_features, inner.out_features) if isinstance(inner, nn.Linear) else (inner.nx, inner.nf)


def linears(part: Part) -> Iterator[Part]:
    """All linear layers in it, itself included, in order of registration; what adapters add does not count."""
    if is_linear(part.module):
        yield part
    elif is_simple(part.module):
        return
    else:
        for child in children(part):
            yield from linears(child)


def has_matrix(module: nn.Module) -> bool:
    """Whether one of its parameters has more than one dimension: it mixes features and does not only scale them."""
    return any(parameter.ndim > 1 for parameter in module.parameters())
