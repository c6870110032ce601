"""The layout of a safetensors file: its beginning, and where each tensor lies; to the byte what the library writes.

https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order in which the library writes tensors, so that each lies at a multiple of its element's size."""
ALIGNMENT = 8


def size_of(tensor: torch.Tensor) -> int:
    """Bytes in a file, also of a tensor that has a shape alone."""
    return tensor.numel() * tensor.element_size()


def lay_out(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's beginning, and the place of each tensor in the file, in the order of their places.

    Args:
        tensors: looked at for their shapes and types.
        metadata: texts that the file holds beside them.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(TYPES)}
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name)):
        offsets[name], end = end, end + size_of(tensors[name])
        described[name] = {
            "dtype": TYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}
