"""Hyper-parameters of a run, in the names that the field uses."""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, ruled
from finetune_api.selection import ModuleKind, NamedPart


class Optimizer(str, Enum):
    ADAMW = "adamw"
    ADAMW_8BIT = "adamw8bit"
    PAGED_ADAMW_8BIT = "pagedAdamw8bit"
    ADAFACTOR = "adafactor"
    SGD = "sgd"


class Scheduler(str, Enum):
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constantWithWarmup"
    COSINE_WITH_RESTARTS = "cosineWithRestarts"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverseSqrt"


PACK_MIN_LENGTH = 16
"""Tokens under which a pack would hold hardly more than one row."""


class LearningRateGroup(Message):
    """A learning rate for a part of the model."""

    select: NamedPart = Field(description="The part; of several groups that name a parameter the first one counts.")
    learning_rate: float = Field(gt=0, le=10, description="Peak rate, in place of learningRate.")


class Hyperparameters(Message):
    """How the parameters learn. What depends on the strategy has no default here; `finetune plan` shows it resolved."""

    model_config = ruled(
        cel(
            f"!has(self.packing) || !self.packing || self.maxLength >= {PACK_MIN_LENGTH}",
            f"packing needs a maxLength of at least {PACK_MIN_LENGTH}; raise maxLength or set packing: false",
            at=".packing",
        ),
        cel(
            "!has(self.warmupSteps) || self.warmupSteps == 0 || self.scheduler != 'constant'",
            "the scheduler constant has no warm-up; set scheduler to constantWithWarmup, or remove warmupSteps",
            at=".warmupSteps",
        ),
        # Taken and then ignored, they would mislead.
        cel(
            "!(self.optimizer in ['adafactor', 'sgd']) || "
            "(self.beta1 == 0.9 && self.beta2 == 0.999 && self.epsilon == 1.0e-8)",
            "beta1, beta2 and epsilon belong to the adamw optimizers; remove them, or set optimizer to adamw",
            at=".optimizer",
        ),
    )

    epochs: float = Field(
        1,
        gt=0,
        le=1000,
        description="Passes over the data; fractions are allowed. maxSteps ends the run earlier.",
    )
    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="End after so many optimizer steps at the latest."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Peak learning rate; absent: what suits the strategy, see `finetune plan`."
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Each block learns with the rate of the one after it times this, biases and norms included; the "
        "head with the whole rate, the embedding with the lowest. 0.9 is usual for encoders.",
    )
    learning_rate_groups: list[LearningRateGroup] | None = Field(
        None, min_length=1, max_length=16, description="Other peak rates for parts of the model, before layerDecay."
    )
    per_device_batch_size: int = Field(
        4, ge=1, le=4096, description="Rows (packs, with packing; images) per device and micro-step."
    )
    eval_batch_size: int | None = Field(None, ge=1, le=4096, description="Absent: perDeviceBatchSize.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536, description="Micro-steps per optimizer step.")
    max_length: int = Field(
        2048,
        ge=8,
        le=1_048_576,
        description="Tokens per row (per pack). Longer conversations and labelled texts are cut at the end, longer "
        "texts of CausalLM are split. Where a model takes fewer, labelled texts are cut to those.",
    )
    packing: bool | None = Field(
        None,
        description="Put several short rows into one of maxLength, without attention between them. Absent: true for "
        "CausalLM (not for streams, PromptTuning and PrefixTuning), false for the others.",
    )
    optimizer: Optimizer = Field(
        Optimizer.ADAMW,
        description="adamw8bit holds the moments in 8 bits; pagedAdamw8bit also pages them to host memory (GPU only).",
    )
    scheduler: Scheduler = Field(Scheduler.COSINE, description="Course of the learning rate after the warm-up.")
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0."
    )
    warmup_steps: int | None = Field(
        None, ge=0, le=10_000_000, description="Warm-up as a number of steps, in place of warmupRatio."
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="Decoupled weight decay; biases and norms are exempt.")
    no_weight_decay: list[ModuleKind] = Field(
        [], max_length=5, description="Kinds of modules that are exempt too.", json_schema_extra=UNIQUE
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean of the gradients.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW: decay of the mean of their squares.")
    epsilon: float = Field(1e-8, gt=0, le=1, description="AdamW: added to the denominator.")
    max_grad_norm: float = Field(
        1.0, ge=0, le=1_000_000, description="Gradients are clipped to this norm; 0: not at all."
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations in the backward pass: less memory, about a third more time. Absent: true on "
        "GPUs, false on CPUs, for images and for PrefixTuning.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target probability spread over all tokens."
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Replaces every dropout probability of the model's configuration. Absent: as it is.",
    )
    neftune_alpha: float | None = Field(
        None, gt=0, le=100, description="Noise on the embeddings while training (Jain et al., 2023); 5 is usual."
    )
    seed: int = Field(
        42, ge=0, le=4_294_967_295, description="Seeds the data order, the held-out rows and every generator."
    )
    deterministic: bool = Field(
        False, description="Only deterministic kernels: bit-equal repetition on the same hardware, slower on GPUs."
    )
    logging_steps: int = Field(1, ge=1, le=100_000, description="Steps between two entries of loss and learning rate.")
    data_workers: int = Field(0, ge=0, le=64, description="Processes that prepare batches beside the training process.")
    torch_compile: bool = Field(False, description="Compile the model: minutes at the start, faster steps on GPUs.")
