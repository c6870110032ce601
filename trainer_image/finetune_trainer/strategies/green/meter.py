"""Measures what training each tensor costs by watching a forward pass, whatever the architecture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune_trainer.learning import learn, plainly_named
from finetune_trainer.strategies.green.costs import Costs
from finetune_trainer.strategies.green.operations import (
    ATTENTION_BACKWARD,
    ATTENTIONS,
    COPIES,
    PRODUCTS,
    SUMS,
    UNCOUNTED,
    forward_flops,
)


def measure(model: nn.Module, loss: Callable[[], Tensor]) -> Costs:
    """The costs of one micro-batch.

    A single tensor gets a gradient, which shows what the loss itself computes again when the gradient goes through it:
    heads that are fused with the loss keep no logits. The model's marks for what learns are not put back.

    Args:
        model: unwrapped, or sharded by FSDP2.
        loss: computes the loss of a batch with it; called once.
    """
    last = [name for name, _ in plainly_named(model)][-1]
    learn(model, [last])
    with Meter(model).watching() as meter:
        value = loss()
    costs = meter.costs()
    if not value.requires_grad or last not in costs.names:
        return costs
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        value.backward()
    model.zero_grad()
    again = counter.get_total_flops() - costs.backward(np.array([name == last for name in costs.names]))
    costs.passing[-1] += max(again, 0.0)
    return costs


class Meter(TorchDispatchMode):
    """Watches the operations of a forward pass.

    Each tensor on the way has a depth: how many parameters were used before it, that it may depend on. Its gradient is
    needed when one of them learns, so what it costs to pass the gradient on to it is booked there. That is exact for
    operations in a chain and for such beside each other (queries, keys and values; shortcuts).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._order: dict[str, int] = {}
        self._owner: dict[int, str] = {}
        self._depth: dict[int, int] = {}
        self._passing: dict[int, float] = defaultdict(float)
        self._own: dict[str, float] = defaultdict(float)
        self._forward = 0.0
        self._block: _Block | None = None

    @contextmanager
    def watching(self) -> Iterator[Meter]:
        """Watch the forward passes inside of it."""
        self._register()
        with _hooked(self._model, self._enter, self._leave), self:
            yield self

    def costs(self) -> Costs:
        """What was seen; parameters that took no part are not in it."""
        passing = np.zeros(len(self._order))
        for depth, flops in self._passing.items():
            passing[depth - 1] += flops
        return Costs(tuple(self._order), self._forward, passing, np.array([self._own[name] for name in self._order]))

    def _register(self) -> None:
        for name, parameter in plainly_named(self._model):
            if (key := _key(parameter)) is not None:
                self._owner[key] = name

    def _enter(self, module: nn.Module) -> None:
        if isinstance(module, FSDPModule):
            # Its parameters have just been gathered into other memory, and those of modules that are gathered with it.
            self._register()
        if _is_checkpointed(module):
            self._block = _Block()

    def _leave(self, module: nn.Module, output: Any) -> None:
        if self._block is not None and _is_checkpointed(module):
            self._pass(max(map(self._depth_of, _keys(_floating(output))), default=0), self._block.again)
            self._block = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._saw(func, args, kwargs or {}, result)
        return result

    def _saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs, outputs = _floating((args, kwargs)), _floating(result)
        sources, targets = _keys(inputs), _keys(outputs)
        if not targets or (set(targets) <= set(sources) and not func._schema.is_mutable):
            return  # nothing new, or a view of the same memory
        packet = func._overloadpacket
        if packet in COPIES and sources and sources[0] in self._owner:
            self._owner[targets[0]] = self._owner[sources[0]]
            return
        for key in sources:
            if key in self._owner:
                self._order.setdefault(self._owner[key], len(self._order))
        flops = self._charge(packet, args, kwargs, result, inputs)
        if self._block is not None:
            self._block = self._block.after(flops, keeps=packet not in SUMS)
        depth = max(map(self._depth_of, sources), default=0)
        for key in targets:
            self._owner.pop(key, None)
            self._depth[key] = depth

    def _charge(self, packet: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor]) -> float:
        """Book what an operation costs; returns what the products in it cost forwards."""
        flops = 0.0
        if packet in ATTENTIONS:
            flops = forward_flops(packet, args, kwargs, result)
            self._pass(max(map(self._depth_of, _keys(list(args[:3])))), ATTENTION_BACKWARD * flops)
        elif packet in PRODUCTS:
            flops = forward_flops(packet, args, kwargs, result)
            factors = [args[place] for place in PRODUCTS[packet]]
            self._book(factors, flops)
            inputs = [tensor for tensor in inputs if not any(tensor is factor for factor in factors)]
        self._forward += flops
        if any(key in self._owner for key in _keys(inputs)):
            # Norms, biases, embeddings: one operation for each number, so that nothing is free.
            numbers = max(tensor.numel() for tensor in _floating(result))
            self._forward += numbers
            self._book(inputs, numbers)
        return flops

    def _book(self, inputs: list[Tensor], flops: float) -> None:
        for key in _keys(inputs):
            if key in self._owner:
                self._own[self._owner[key]] += flops
            else:
                self._pass(self._depth_of(key), flops)

    def _pass(self, depth: int, flops: float) -> None:
        if depth:
            self._passing[depth] += flops

    def _depth_of(self, key: int) -> int:
        return self._order[self._owner[key]] + 1 if key in self._owner else self._depth.get(key, 0)


class _Block(NamedTuple):
    """What the backward pass computes again of a checkpointed block, in FLOPs."""

    again: float = 0.0
    pending: float = 0.0
    """The last product: computed again only if something behind it keeps its result."""

    def after(self, product: float, *, keeps: bool) -> _Block:
        if product:
            return _Block(self.again + self.pending, product)
        return _Block(self.again + self.pending, 0.0) if keeps else self


def _is_checkpointed(module: nn.Module) -> bool:
    if isinstance(module, GradientCheckpointingLayer):
        return bool(module.gradient_checkpointing and module.training)
    return isinstance(module, CheckpointWrapper)


@contextmanager
def _hooked(
    model: nn.Module, enter: Callable[[nn.Module], None], leave: Callable[[nn.Module, Any], None]
) -> Iterator[None]:
    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda it, _: enter(it)))
        handles.append(module.register_forward_hook(lambda it, _, output: leave(it, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _keys(tensors: list[Tensor]) -> list[int]:
    return [key for tensor in tensors if (key := _key(tensor)) is not None]


def _key(tensor: Tensor) -> int | None:
    """The memory that a tensor lies in, which its views share; None for what has none of its own."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return None
    return tensor.untyped_storage().data_ptr() or None
