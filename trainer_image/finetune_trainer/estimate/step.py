"""One training step of the job's own model, on tensors without numbers, and the memory that it takes on its way.

Everything that the step of a real trainer allocates is allocated here too, by the same code: by the architecture, the
adapters, recomputation, autocast, the fused loss. Only that kernels of other devices need other workspaces is not seen;
attention goes through torch's fused kernel, as it does on GPUs.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import add_fused_lm_head

from finetune_api.job import TaskType
from finetune_api.task import LANGUAGE
from finetune_trainer.estimate.course import END, FORWARD, Course, Point
from finetune_trainer.learning import LeanRecomputationCallback
from finetune_trainer.structure import Structure

if TYPE_CHECKING:
    from finetune_trainer.estimate.sketch import Sketch

SIDE = 224
"""Pixels of an image's side where the configuration does not tell: what most image models take."""


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self._highest = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def ignore(self, tensor: torch.Tensor) -> None:
        """From now on this one does not count."""
        storage = tensor.untyped_storage()
        self._count(storage)
        self.alive -= self._sizes[id(storage)]
        self._sizes[id(storage)] = 0

    def mark(self) -> int:
        """The most bytes that were alive since the last mark."""
        highest, self._highest = self._highest, self.alive
        return highest

    def _count(self, storage: torch.UntypedStorage) -> None:
        # Views share the storage, which torch wraps in the same object for as long as anybody holds it.
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.alive += storage.nbytes()
            self._highest = max(self._highest, self.alive)
            weakref.finalize(storage, self._freed, id(storage))

    def _freed(self, storage: int) -> None:
        self.alive -= self._sizes.pop(storage)


class Recorder:
    """Writes down a point at each gradient that is made, and lets the gradient go."""

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        self.points: list[Point] = []
        self._meter, self._made = meter, 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._record, name))

    def note(self, where: str) -> None:
        """Write down a point."""
        self.points.append(Point(self._meter.mark(), self._made, where))

    def _record(self, name: str, parameter: torch.Tensor) -> None:
        self.note(name)
        self._made += parameter.numel()
        parameter.grad = None


def course(sketch: Sketch, sharded: bool) -> Course:
    """How memory goes up and down in one micro-step. Uses the sketch up.

    Args:
        sharded: FSDP hands the passes its parameters in their precision; otherwise autocast converts them.
    """
    model = sketch.model
    model.train()
    if model.config.get_text_config()._attn_implementation != "eager":
        _fuse_attention(model)
    if sketch.spec.hyperparameters.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        LeanRecomputationCallback().on_train_begin(None, None, None, model=model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialize(model, sketch.compute if sharded else None)
        meter = Meter()
        recorder = Recorder(model, meter)
        half = sketch.compute is not torch.float32
        with meter:
            for parameter in model.parameters():
                meter.ignore(parameter)
            with torch.autocast("cpu", sketch.compute) if half else nullcontext():
                loss = _loss(sketch)
            recorder.note(FORWARD)
            loss.backward()
        recorder.note(END)
    return tuple(recorder.points)


def rule_of_thumb(sketch: Sketch) -> Course:
    """Activations of transformers by their sizes: 34 bytes for each feature of each token and block in half precision.

    Recomputed, they are 2 bytes, and those of one block. Without the matrices of attention, which fused kernels do not
    hold (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.1).
    """
    values, blocks = sketch.spec.hyperparameters, Structure.of(sketch.model).blocks
    width = max((block.width or 0 for block in blocks), default=0)
    features = values.per_device_batch_size * values.max_length * width * sketch.compute.itemsize // 2
    kept = 2 * features * len(blocks) + 34 * features
    activations = kept if values.gradient_checkpointing else 34 * features * len(blocks)
    learning = sum(parameter.numel() for parameter in sketch.model.parameters() if parameter.requires_grad)
    return Point(activations, 0, FORWARD), Point(0, learning, END)


def _fuse_attention(model: nn.Module) -> None:
    """Without dropout, for which only the kernels of GPUs need no matrix of all pairs of tokens."""
    for module in model.modules():
        if "Attention" in type(module).__name__:
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
            for child in module.children():
                if isinstance(child, nn.Dropout):
                    child.p = 0.0


def _materialize(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Move from the meta device to what passes for the CPU; parameters that are shared stay so.

    Args:
        dtype: of all parameters; None: as they are.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    tensor = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                    moved[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _loss(sketch: Sketch) -> torch.Tensor:
    spec, model = sketch.spec, sketch.model
    if spec.task.type not in LANGUAGE:
        logits: torch.Tensor = model(**_inputs(sketch)).logits
        return logits.float().sum()
    inputs = _inputs(sketch)
    labels = inputs["input_ids"]
    if spec.hyperparameters.label_smoothing:
        smoother = LabelSmoother(spec.hyperparameters.label_smoothing)
        return smoother(model(**inputs), labels, shift_labels=True)
    # As SFTTrainer does it: the logits of a batch are never there all at once.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    found: torch.Tensor = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    return -found.sum()


def _inputs(sketch: Sketch) -> dict[str, torch.Tensor]:
    """A micro-batch of the longest rows: token ids (rows, tokens) and their mask, or pixels (rows, 3, side, side)."""
    values, config = sketch.spec.hyperparameters, sketch.model.config
    rows = values.per_device_batch_size
    if sketch.spec.task.type is TaskType.IMAGE_CLASSIFICATION:
        return {"pixel_values": torch.zeros(rows, *_image(config))}
    tokens = min(values.max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(config: Any) -> tuple[int, int, int]:
    timm = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    if timm:
        return tuple(timm)
    side = getattr(config, "image_size", None) or SIDE
    height, width = (side, side) if isinstance(side, int) else side
    return 3, height, width
