"""Modules that are held in float32 inside of a model of another precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Float32(nn.Module):
    """Mixed into a module's own class, so that its name, its parameters and what it is stay as they were."""

    spoken: torch.dtype

    def forward(self, given: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        # Token ids have no precision of their own.
        wide, spoken = (given.float(), given.dtype) if given.is_floating_point() else (given, self.spoken)
        found: torch.Tensor = super().forward(wide, *more, **named)
        return found.to(spoken)


def hold_in_float32(module: nn.Module, spoken: torch.dtype) -> None:
    """Turn a module's weights into float32; it goes on taking and giving what the modules around it compute in.

    In bfloat16 a weight near 1 has neighbours 0.004 away, and the updates of most steps are smaller and lost.

    Args:
        module: takes a tensor and gives one, as norms, embeddings, heads and poolers do.
        spoken: precision of the model around it; float32 leaves the module as it is.
    """
    if spoken is torch.float32:
        return
    module.float()
    module.spoken = spoken
    kind = type(module)
    module.__class__ = type(kind.__name__, (_Float32, kind), {})
