"""What each optimizer holds for a parameter. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from finetune_api.hyperparameters import Optimizer

FLOAT = 4
BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit moments (functional.py: blocksize 256)."""
LEAST_8BIT = 4096
"""Smaller tensors keep 32-bit moments (min_8bit_size of bitsandbytes' optimizers)."""
LEAST_PAGED = 100_000
"""Smaller tensors are not paged (bitsandbytes/optim/optimizer.py: get_state_buffer)."""
MAP = 256 * FLOAT
"""A tensor's own copy of the table that 8-bit numbers stand for."""


@dataclass(frozen=True)
class State:
    """Bytes on the accelerator, and bytes that are paged to the host."""

    device: int
    host: int = 0


def state_bytes(optimizer: Optimizer, shape: tuple[int, ...], embedding: bool = False) -> State:
    """The state of one parameter, as one rank holds it.

    Args:
        shape: of the rank's part.
        embedding: of a table of embeddings: the Trainer has bitsandbytes keep its moments in 32 bits.
    """
    elements = prod(shape)
    match optimizer:
        case Optimizer.ADAMW:
            return State(2 * FLOAT * elements)
        case Optimizer.ADAMW_8BIT | Optimizer.PAGED_ADAMW_8BIT:
            size = _moments_8bit(elements, embedding)
            paged = optimizer is Optimizer.PAGED_ADAMW_8BIT and elements >= LEAST_PAGED
            return State(0, size) if paged else State(size)
        case Optimizer.ADAFACTOR:
            return State(FLOAT * _factored(shape))
        case Optimizer.SGD:
            return State(0)  # without momentum it holds nothing


def _moments_8bit(elements: int, embedding: bool) -> int:
    if embedding or elements < LEAST_8BIT:
        return 2 * FLOAT * elements
    return 2 * (elements + FLOAT * -(-elements // BLOCK) + MAP)


def _factored(shape: tuple[int, ...]) -> int:
    """Elements of a second moment held by rows and columns (Shazeer and Stern, 2018); vectors are held whole."""
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]
