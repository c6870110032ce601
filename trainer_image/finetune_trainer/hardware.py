"""What this machine can compute with, and what the spec asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from finetune_api.job import Attention, Dtype, FineTuneJobSpec
from finetune_trainer.errors import UsageError
from finetune_trainer.memory import memory_limit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16, Dtype.FLOAT16: torch.float16}


@dataclass(frozen=True)
class Hardware:
    """The device of this process."""

    cuda: bool
    bfloat16: bool
    """Whether the GPU computes in bfloat16 natively; emulation would be slower than float32."""
    flash_attention: bool
    """Whether the flash-attn package is installed."""

    @classmethod
    def of(cls, gpus: int) -> Hardware:
        """The hardware that a pod with so many GPUs should see.

        Raises:
            UsageError: a GPU is asked for and none is visible.
        """
        if gpus == 0:
            return cls(cuda=False, bfloat16=False, flash_attention=False)
        if not torch.cuda.is_available():
            raise UsageError(
                f"spec.resources.gpusPerNode is {gpus}, but torch {torch.__version__} sees no GPU in this pod",
                "use the CUDA variant of the trainer image on a node with a driver, or set resources.gpusPerNode to 0",
            )
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(cuda=True, bfloat16=native, flash_attention=find_spec("flash_attn") is not None)

    def device_of(self, local_rank: int) -> str:
        """The device of one of this node's processes."""
        return f"cuda:{local_rank}" if self.cuda else "cpu"

    def memory(self, processes: int) -> int:
        """Bytes that each of the pod's processes has to itself: its GPU's memory, or its share of the pod's."""
        if self.cuda:
            return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        return memory_limit() // processes


@dataclass(frozen=True)
class Compute:
    """How this run computes.

    Attributes:
        dtype: precision of the forward and backward pass.
        attention: implementation by its name in transformers.
    """

    hardware: Hardware
    dtype: torch.dtype
    attention: str

    @classmethod
    def of(cls, spec: FineTuneJobSpec) -> Compute:
        """What the spec asks for; raises UsageError where this machine cannot do it."""
        hardware = Hardware.of(spec.resources.gpus_per_node)
        dtype = compute_dtype(spec.model.dtype, hardware)
        return cls(hardware, dtype, attention_implementation(spec.model.attention, hardware, dtype))


def compute_dtype(dtype: Dtype, hardware: Hardware) -> torch.dtype:
    """The precision in which the model computes.

    Raises:
        UsageError: the hardware cannot compute in it.
    """
    if dtype is Dtype.AUTO:
        return torch.bfloat16 if hardware.bfloat16 else torch.float32
    if dtype is Dtype.FLOAT16 and not hardware.cuda:
        raise UsageError(
            "spec.model.dtype: float16 needs a GPU: its loss scaling and kernels do not exist for CPUs",
            "set model.dtype to auto (float32 on a CPU) or bfloat16",
        )
    if dtype is Dtype.BFLOAT16 and hardware.cuda and not hardware.bfloat16:
        raise UsageError(
            "spec.model.dtype: this GPU does not compute in bfloat16 (it came with Ampere)",
            "set model.dtype to float16 or auto",
        )
    return DTYPES[dtype]


def attention_implementation(attention: Attention, hardware: Hardware, compute: torch.dtype) -> str:
    """The attention implementation by its name in transformers.

    Raises:
        UsageError: flash attention is asked for where it cannot run.
    """
    half = compute in (torch.bfloat16, torch.float16)
    if attention is Attention.AUTO:
        return "flash_attention_2" if hardware.flash_attention and half else "sdpa"
    if attention is Attention.FLASH_ATTENTION_2:
        _refuse_flash_attention(hardware, half)
    return attention.value


def asked_attention(chosen: str, spec: Attention, config: PretrainedConfig, loader: str) -> str | None:
    """What to ask of transformers for a model of this configuration; None: whatever the architecture has.

    Nothing for sdpa, which it takes by itself, while architectures without would refuse to be asked; and nothing where
    nobody has asked for what is fastest here, and the architecture does not have it.

    Args:
        chosen: by `attention_implementation`.
        spec: what was asked for.
        loader: name of the class that loads the model.
    """
    import transformers

    if chosen == "sdpa":
        return None
    found = getattr(transformers, loader)._model_mapping.get(type(config), ())
    classes = found if isinstance(found, tuple) else (found,)
    flash = all(getattr(cls, "_supports_flash_attn", False) for cls in classes)
    return chosen if flash or spec is not Attention.AUTO else None


def _refuse_flash_attention(hardware: Hardware, half: bool) -> None:
    field = "spec.model.attention: flash_attention_2"
    if not hardware.cuda:
        raise UsageError(f"{field} needs a GPU", "set model.attention to auto or sdpa")
    if not hardware.flash_attention:
        raise UsageError(
            f"{field} needs the package flash-attn, which this image does not have",
            "set model.attention to auto or sdpa, or build the image with flash-attn",
        )
    if not half:
        raise UsageError(
            f"{field} computes in bfloat16 or float16 only", "set model.dtype to bfloat16, or model.attention to sdpa"
        )
