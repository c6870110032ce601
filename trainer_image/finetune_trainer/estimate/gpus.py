"""GPU products: how much memory each has, and whether it computes in bfloat16. Pure.

Memory is what nvidia-smi, and so the node label nvidia.com/gpu.memory, shows in MiB with ECC on: H100, A100, A10G,
L40S, L4 and T4 as listed in github.com/modal-labs/modal-client/pull/2797; the others as they stand in many public
outputs of nvidia-smi. bfloat16 came with compute capability 8.0 (CUDA C++ Programming Guide, table of
arithmetic instructions), which T4 (7.5) and V100 (7.0) do not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 2**20
GB = 10**9
MIG = re.compile(r"MIG-\d+g\.(\d+)gb")
"""How NVIDIA's labels name a slice of a GPU, with its memory."""
SIZE = re.compile(r"(?<![0-9])(\d{2,3})GB")


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        memory: bytes.
        bfloat16: whether it computes in it natively.
    """

    memory: int
    bfloat16: bool = True


PRODUCTS = (
    ("B200", Gpu(183_359 * MIB)),
    ("H200", Gpu(143_771 * MIB)),
    ("GH200-480GB", Gpu(97_871 * MIB)),
    ("H100-NVL", Gpu(95_830 * MIB)),
    ("H100", Gpu(81_559 * MIB)),
    ("A100-SXM4-40GB", Gpu(40_960 * MIB)),
    ("A100-PCIE-40GB", Gpu(40_960 * MIB)),
    ("A100", Gpu(81_920 * MIB)),
    ("L40S", Gpu(46_068 * MIB)),
    ("L4", Gpu(23_034 * MIB)),
    ("A10G", Gpu(23_028 * MIB)),
    ("A10", Gpu(23_028 * MIB)),
    ("RTX-4090", Gpu(24_564 * MIB)),
    ("T4", Gpu(15_360 * MIB, bfloat16=False)),
    ("V100-SXM2-16GB", Gpu(16_384 * MIB, bfloat16=False)),
    ("V100-PCIE-16GB", Gpu(16_384 * MIB, bfloat16=False)),
    ("V100", Gpu(32_768 * MIB, bfloat16=False)),
)
"""By a part of the label's value; the first that fits counts."""


def gpu_of(product: str | None) -> Gpu | None:
    """The GPU that a value of the node label nvidia.com/gpu.product means; None where nothing is known of it.

    A slice (MIG) has the memory that its name tells; of a product that is not listed, so does its name, if it does.
    """
    if product is None:
        return None
    known = next((gpu for name, gpu in PRODUCTS if _names(name, product)), None)
    told = MIG.search(product) or (None if known else SIZE.search(product))
    if told is None:
        return known
    return Gpu(int(told[1]) * GB, known.bfloat16 if known else True)


def _names(name: str, product: str) -> bool:
    return re.search(rf"(^|-){name}(-|$)", product) is not None
