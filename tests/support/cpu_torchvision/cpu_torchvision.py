"""Lets torchvision from PyPI, which is built for CUDA, be imported beside a CPU build of torch.

Its compiled operators cannot be loaded there, and its Python part fails over the first of them that it wants to
describe; with it fail transformers and TRL, which import it wherever it is installed. Declared, they may be imported;
called, they still say that there is no kernel. Nothing of the product needs them. Whoever installs torch and
torchvision from one index needs none of this.
"""

from __future__ import annotations

from importlib.metadata import version

import torch

DESCRIBED = ("nms", "qnms")
"""The operators that torchvision describes without having asked whether they are there."""

_library: torch.library.Library | None = None


def declare_operators() -> None:
    """Declare what torchvision is going to describe; nothing where it can load its operators itself."""
    global _library  # noqa: PLW0603 - what is declared goes with the library object
    fits = torch.version.cuda is not None or version("torchvision").endswith("+cpu")
    if fits or _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in DESCRIBED:
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
