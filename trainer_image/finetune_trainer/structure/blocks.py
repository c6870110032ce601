"""The blocks of a model, and the attention and feed-forward parts of a block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from finetune_trainer.structure.modules import (
    CONTAINERS,
    Part,
    children,
    has_matrix,
    is_batch_norm,
    is_convolution,
    is_layer_norm,
    is_simple,
    linears,
    unwrapped,
    widths,
)

STAGE = re.compile(r"Stage|Group")
"""Classes that hold blocks of one resolution (ResNet, Swin, ConvNext) or blocks that share weights (ALBERT)."""
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)
PROJECTIONS = [re.compile(rf"^{letter}($|_|{word})") for letter, word in (("q", "uery"), ("k", "ey"), ("v", "alue"))]
FUSED = re.compile(r"qkv|query_key_value", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        layer: its number; the one at the input is 0.
        attention: its child modules that attend (several with cross attention), norms within them included.
        feed_forward: its other children that mix features: one module for Llama, GPT-2 and ViT; BERT's intermediate
            and output. Empty in convolutional blocks.
    """

    layer: int
    name: str
    module: nn.Module
    attention: tuple[Part, ...]
    feed_forward: tuple[Part, ...]

    @property
    def width(self) -> int | None:
        """Features that go in and out; None where there is no attention with linear layers."""
        first = next((linear for part in self.attention for linear in linears(part)), None)
        return widths(first.module)[0] if first else None

    @property
    def attention_output(self) -> Part | None:
        """The linear layer whose result attention adds to the residual stream; None: it cannot be told."""
        return self._output(self.attention)

    @property
    def feed_forward_output(self) -> Part | None:
        """The linear layer whose result the feed-forward adds to the residual stream; None: there is not just one.

        A mixture of experts has none.
        """
        return None if any(_has_experts(part) for part in self.feed_forward) else self._output(self.feed_forward)

    def _output(self, parts: tuple[Part, ...]) -> Part | None:
        # Modules are registered in the order of their use, but that gates may come after what they gate.
        fitting = [linear for part in parts for linear in linears(part) if widths(linear.module)[1] == self.width]
        return fitting[-1] if fitting else None


def _has_experts(part: Part) -> bool:
    stacked = any(parameter.ndim > 2 for parameter in part.module.parameters())
    lists = (child for child in part.module.modules() if isinstance(child, nn.ModuleList))
    return stacked or any(not is_simple(member) for experts in lists for member in experts)


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks in order of registration, which is that of the forward pass.

    They are the members of the outermost list of composite modules (of the list with the most parameters, and of others
    with members of its class: the stages of ResNet, the two sides of T5). Lists of stages are opened. Without such a
    list they are the links of the longest chain of convolutions: all convolutions of VGG, the modules of Inception.
    """
    root = Part("", model)
    stacks = list(_stacks(root))
    if not stacks:
        return [_block(layer, link) for layer, link in enumerate(_chain(root))]
    main = max(stacks, key=lambda stack: sum(_size(member.module) for member in stack))
    classes = {type(member.module) for member in main}
    joined = [member for stack in stacks for member in stack if classes & {type(other.module) for other in stack}]
    return [_block(layer, member) for layer, member in enumerate(joined)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stacks(part: Part) -> Iterator[list[Part]]:
    for child in children(part):
        members = list(children(child)) if isinstance(child.module, CONTAINERS) else []
        if members and not any(is_simple(member.module) for member in members):
            yield _opened(members)
        elif not is_simple(child.module):
            yield from _stacks(child)


def _opened(members: list[Part]) -> list[Part]:
    opened: list[Part] = []
    for member in members:
        holds = isinstance(member.module, CONTAINERS) or STAGE.search(type(member.module).__name__)
        inner = _inner(member) if holds else []
        opened += inner or [member]
    return opened


def _inner(stage: Part) -> list[Part]:
    if isinstance(stage.module, CONTAINERS):
        members = list(children(stage))
        return _opened(members) if not any(is_simple(member.module) for member in members) else []
    return [member for stack in _stacks(stage) for member in stack]


def _chain(root: Part) -> list[Part]:
    links: list[Part] = []
    for name, module in root.module.named_modules():
        if is_simple(module):
            continue
        here = [child for child in children(Part(name, module)) if any(map(is_convolution, child.module.modules()))]
        links = here if len(here) > len(links) else links
    return links


def _block(layer: int, part: Part) -> Block:
    inside = [child for child in _inside(part) if not is_layer_norm(child.module) and not is_batch_norm(child.module)]
    attention = [child for child in inside if _attends(child)]
    # Without attention beside it a matrix may be anything, such as a convolution, unless its name says more.
    others = [child for child in inside if child not in attention and has_matrix(child.module)]
    feed_forward = [child for child in others if attention or _is_named(FEED_FORWARD, child)]
    return Block(layer, part.name, part.module, tuple(attention), tuple(feed_forward))


def _inside(block: Part) -> Iterator[Part]:
    for child in children(block):
        if isinstance(child.module, CONTAINERS):
            yield from _inside(child)
        else:
            yield child


def _attends(part: Part) -> bool:
    classes = (type(unwrapped(module)).__name__ for module in part.module.modules())
    return _is_named(ATTENTION, part) or any(map(ATTENTION.search, classes)) or _projects(part)


def _projects(part: Part) -> bool:
    names = [linear.name.rsplit(".", 1)[-1] for linear in linears(part)]
    return any(map(FUSED.search, names)) or all(any(map(letter.match, names)) for letter in PROJECTIONS)


def _is_named(pattern: re.Pattern[str], part: Part) -> bool:
    own = part.name.rsplit(".", 1)[-1]
    return bool(pattern.search(own) or pattern.search(type(unwrapped(part.module)).__name__))
