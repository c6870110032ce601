"""What training each tensor costs: floating point operations of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
"""(K,): which of the tensors learn, in the order of the costs."""
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Operations of one step, by tensor (arXiv 2309.13192, section 3.1).

    The K tensors stand in the order in which the forward pass uses them first, from the input to the output.

    Attributes:
        names: of the parameters.
        forward: T_fp, the forward pass.
        passing: t_dy, (K,): for the gradient to come down to tensor k from the one after it.
        own: t_dw, (K,): for the tensor's own gradient.
    """

    names: tuple[str, ...]
    forward: float
    passing: Vector
    own: Vector

    def backward(self, chosen: Mask) -> float:
        """T_bp: the gradient flows down to the first chosen tensor, and is computed for every chosen one."""
        return float(np.maximum.accumulate(chosen) @ self.passing + chosen @ self.own)

    @property
    def full(self) -> float:
        """A step's operations when everything learns, forward and backward."""
        return self.forward + float(self.passing.sum() + self.own.sum())

    def share(self, chosen: Mask) -> float:
        """A step's operations when the chosen tensors learn, as a share of those when everything does."""
        return (self.forward + self.backward(chosen)) / self.full

    def alone(self) -> Vector:
        """(K,): the backward pass when a single tensor learns."""
        return np.cumsum(self.passing[::-1])[::-1] + self.own
