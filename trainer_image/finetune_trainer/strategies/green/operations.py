"""What torch's operations cost, in FLOPs as torch counts them: 2 for a multiplication and an addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


def _sum_in_place(_: Tensor, rows: Tensor, matrix: Tensor, *__: Any, **___: Any) -> int:
    return 2 * rows.numel() * matrix.shape[-1]


def _grouped(rows: Tensor, matrices: Tensor, *_: Any, **__: Any) -> int:
    return 2 * rows.numel() * matrices.shape[-1]


UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    aten.addmm_: _sum_in_place,
    aten.baddbmm_: _sum_in_place,
    aten._grouped_mm: _grouped,
}
"""What torch's FLOP counter has no formula for; to be given to it as custom_mapping."""
for formula in UNCOUNTED.values():
    # So the counter passes tensors and not their shapes.
    formula._get_raw = True  # type: ignore[attr-defined]

PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.addmm_: (1, 2),
    aten.baddbmm_: (1, 2),
    aten.convolution: (0, 1),
    aten._convolution: (0, 1),
    aten.cudnn_convolution: (0, 1),
    aten._grouped_mm: (0, 1),
}
"""Where the two factors stand. The gradient of each is a product as large as that of the forward pass."""
ATTENTIONS = {
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._flash_attention_forward,
    aten._efficient_attention_forward,
}
"""Fused softmax(QK')V."""
ATTENTION_BACKWARD = 2.5
"""Times the forward pass: five products instead of two, the scores being computed once more, and always all of them."""
COPIES = {aten._to_copy, aten.clone}
"""Such as those to the precision of autocast: the gradient goes through them for nothing."""
SUMS = {aten.add, aten.add_, aten._unsafe_view}
"""Keep nothing for the backward pass."""


def forward_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of a product or an attention."""
    return int((UNCOUNTED.get(packet) or flop_registry[packet])(*args, **kwargs, out_val=result))
