"""Hyper-parameters in the names of the Hugging Face trainers: every field is mapped here, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from finetune_api.hyperparameters import Hyperparameters, Optimizer, Scheduler
from finetune_api.job import FineTuneJobSpec
from finetune_trainer.data.prepared import Prepared
from finetune_trainer.errors import UsageError
from finetune_trainer.hardware import Compute, Hardware

OPTIMIZERS = {
    Optimizer.ADAMW: "adamw_torch_fused",
    Optimizer.ADAMW_8BIT: "adamw_bnb_8bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
    Optimizer.ADAFACTOR: "adafactor",
    Optimizer.SGD: "sgd",
}
SCHEDULERS = {
    Scheduler.COSINE: "cosine",
    Scheduler.LINEAR: "linear",
    Scheduler.CONSTANT: "constant",
    Scheduler.CONSTANT_WITH_WARMUP: "constant_with_warmup",
    Scheduler.COSINE_WITH_RESTARTS: "cosine_with_restarts",
    Scheduler.POLYNOMIAL: "polynomial",
    Scheduler.INVERSE_SQRT: "inverse_sqrt",
}
ADAM_ONLY = ("beta1", "beta2", "epsilon")
"""What only Adam and its kin have; taken and then ignored it would mislead."""


def common_arguments(
    spec: FineTuneJobSpec, prepared: Prepared, compute: Compute, scratch: Path, world_size: int = 1
) -> dict[str, Any]:
    """The settings of every task's trainer, as keyword arguments of TrainingArguments.

    Args:
        spec: a resolved job's spec.
        prepared: the data; the number of steps follows from it.
        scratch: folder for staged checkpoints.
        world_size: number of ranks that divide the rows among them.

    Raises:
        UsageError: a hyper-parameter that cannot work, with the way out.
    """
    values = spec.hyperparameters
    refuse_what_cannot_work(values, compute.hardware)
    every = spec.evaluation.every_steps
    return dict(
        output_dir=str(scratch / "checkpoints"),
        **(_steps_of_stream(values) if spec.dataset.streaming else _duration(spec, len(prepared.train), world_size)),
        per_device_train_batch_size=values.per_device_batch_size,
        gradient_accumulation_steps=accumulation(spec, world_size),
        **_optimization(values),
        **_precision_and_memory(values, compute),
        per_device_eval_batch_size=values.eval_batch_size or values.per_device_batch_size,
        eval_strategy="steps" if prepared.validation is not None and every else "no",
        eval_steps=every,
        prediction_loss_only=True,
        logging_steps=values.logging_steps,
        # A NaN must be seen, not replaced by the average of what was before it.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.checkpoint.every_steps,
        # Retention is that of the checkpoints in the bucket: the trainer would rotate before they are uploaded.
        save_total_limit=None,
        restore_callback_states_from_checkpoint=True,
        seed=values.seed,
        data_seed=values.seed,
        full_determinism=values.deterministic,
        dataloader_num_workers=values.data_workers,
        # Looking for them costs a walk through the graph in every step; `learning` asks for it where there are some.
        ddp_find_unused_parameters=False,
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
    )


def global_batch(spec: FineTuneJobSpec, world_size: int) -> int:
    """Rows that one optimizer step learns from, over all ranks: the same with fewer of them."""
    return spec.hyperparameters.per_device_batch_size * accumulation(spec, world_size) * world_size


def accumulation(spec: FineTuneJobSpec, world_size: int) -> int:
    """Batches that each rank takes for a step, so that a step learns from the global batch with fewer ranks too.

    Raises:
        UsageError: the ranks cannot divide it evenly.
    """
    planned = max(world_size, spec.resources.ranks)
    batches = spec.hyperparameters.gradient_accumulation_steps * planned
    each, left = divmod(batches, world_size)
    if left:
        factor = world_size // math.gcd(planned, world_size)
        raise UsageError(
            f"spec.hyperparameters.gradientAccumulationSteps: a step has {batches} batches, which {world_size} ranks "
            "cannot divide evenly",
            f"set gradientAccumulationSteps to a multiple of {factor}, or run on all {spec.resources.nodes} nodes",
        )
    return each


def _duration(spec: FineTuneJobSpec, rows: int, world_size: int) -> dict[str, Any]:
    values = spec.hyperparameters
    # The library lets max_steps override the epochs upwards too; here whichever comes first ends the run.
    batches = math.ceil(math.ceil(rows / values.per_device_batch_size) / world_size)
    per_epoch = math.ceil(batches / accumulation(spec, world_size))
    by_epochs = math.ceil(values.epochs * per_epoch)
    capped = values.max_steps is not None and values.max_steps < by_epochs
    return {
        "num_train_epochs": values.epochs,
        "max_steps": values.max_steps if capped else -1,
    }


def _steps_of_stream(values: Hyperparameters) -> dict[str, Any]:
    """A stream goes round until the steps are done, and finds its place by itself."""
    if values.max_steps is None:
        raise UsageError(
            "spec.hyperparameters.maxSteps: how long a stream is shows only at its end", "set hyperparameters.maxSteps"
        )
    return {"max_steps": values.max_steps, "ignore_data_skip": True}


def _optimization(values: Hyperparameters) -> dict[str, Any]:
    return {
        "learning_rate": values.learning_rate,
        "optim": OPTIMIZERS[values.optimizer],
        "lr_scheduler_type": SCHEDULERS[values.scheduler],
        # Below 1 the library reads it as a share of the steps.
        "warmup_steps": values.warmup_steps if values.warmup_steps is not None else values.warmup_ratio,
        "weight_decay": values.weight_decay,
        "adam_beta1": values.beta1,
        "adam_beta2": values.beta2,
        "adam_epsilon": values.epsilon,
        "max_grad_norm": values.max_grad_norm,
        "label_smoothing_factor": values.label_smoothing,
        "neftune_noise_alpha": values.neftune_alpha,
        "average_tokens_across_devices": True,
    }


def _precision_and_memory(values: Hyperparameters, compute: Compute) -> dict[str, Any]:
    return {
        "use_cpu": not compute.hardware.cuda,
        "bf16": compute.dtype is torch.bfloat16,
        "fp16": compute.dtype is torch.float16,
        "activation_checkpointing": bool(values.gradient_checkpointing),
        # The reentrant kind gives frozen layers no gradient at all.
        "activation_checkpointing_kwargs": {"use_reentrant": False} if values.gradient_checkpointing else None,
        "torch_compile": values.torch_compile,
    }


def refuse_what_cannot_work(values: Hyperparameters, hardware: Hardware) -> None:
    """Raise UsageError for settings that would fail late or be ignored."""
    if values.optimizer is Optimizer.PAGED_ADAMW_8BIT and not hardware.cuda:
        raise UsageError(
            "spec.hyperparameters.optimizer: pagedAdamw8bit pages GPU memory and needs a GPU",
            "set optimizer to adamw8bit (works on CPUs) or adamw",
        )
    if values.optimizer in (Optimizer.ADAFACTOR, Optimizer.SGD):
        _refuse_changed(values, ADAM_ONLY, f"has no meaning for the optimizer {values.optimizer.value}")
    if values.scheduler is Scheduler.CONSTANT and values.warmup_steps:
        raise UsageError(
            "spec.hyperparameters.warmupSteps: the scheduler constant has no warm-up",
            "set scheduler to constantWithWarmup, or remove warmupSteps",
        )


def _refuse_changed(values: Hyperparameters, fields: tuple[str, ...], why: str) -> None:
    for field in fields:
        if getattr(values, field) != Hyperparameters.model_fields[field].default:
            raise UsageError(f"spec.hyperparameters.{field} {why}", f"remove {field}, or set optimizer to adamw")
