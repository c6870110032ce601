"""A job's model as its strategy prepares it, without numbers: every parameter has a shape and takes no memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune_api.job import FineTuneJobSpec, StrategyType
from finetune_api.strategy import StrategySpec
from finetune_trainer.angle import RANKED
from finetune_trainer.hardware import Hardware, compute_dtype
from finetune_trainer.model import Source, load_config, override_dropout
from finetune_trainer.strategies import Strategy, strategy_of
from finetune_trainer.strategies.base import ModelStrategy
from finetune_trainer.structure import Part, Structure
from finetune_trainer.structure.modules import is_linear, linears
from finetune_trainer.tasks import task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from finetune_trainer.loaded import Loaded


@dataclass(frozen=True)
class Sketch:
    """One model, to be used once: whoever shards it or runs it changes it.

    Attributes:
        model: on the meta device; what learns asks for gradients.
        loaded: the model before it was prepared.
        compute: precision of the passes.
        quantized: names of the parameters that are stored in 4 bits; their shapes are those of the numbers they stand
            for.
    """

    spec: FineTuneJobSpec
    model: PreTrainedModel
    loaded: Loaded
    compute: torch.dtype
    quantized: frozenset[str]

    @classmethod
    def of(cls, spec: FineTuneJobSpec, folder: Path, compute: torch.dtype) -> Sketch:
        """The model of a resolved spec.

        Args:
            folder: holds config.json, and the code beside it where that is trusted.

        Raises:
            UsageError: the spec names what the architecture does not have.
        """
        config = load_config(folder, spec.model)
        override_dropout(config, spec.hyperparameters.dropout)
        decided, _ = without_measures(spec.strategy)
        strategy = strategy_of(decided)
        loaded = task_of(spec).skeleton(Source(folder, spec.model, config, torch.float32, "sdpa"))
        loaded.model.to(strategy.weights_dtype(compute))
        packed = _packed(loaded.model) if strategy.quantization(compute) else set()
        with torch.device("meta"):
            model = strategy.prepare(loaded)
        _hold_as_loaded(model, strategy, compute, packed, config)
        quantized = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in packed)
        return cls(spec, model, loaded, compute, quantized)


def compute_of(spec: FineTuneJobSpec, bfloat16: bool) -> torch.dtype:
    """The precision of the passes on the job's own hardware, which need not be this machine's.

    Args:
        bfloat16: whether its GPU computes in it.
    """
    gpu = spec.resources.gpus_per_node > 0
    return compute_dtype(spec.model.dtype, Hardware(cuda=gpu, bfloat16=gpu and bfloat16, flash_attention=False))


def without_measures(strategy: StrategySpec) -> tuple[StrategySpec, list[str]]:
    """The strategy without what must be measured first, and notes on that."""
    notes = []
    select = strategy.select
    if select is not None and select.angle is not None:
        notes.append(
            f"of the attention and feed-forward parts only {select.angle.top_k}: those with the "
            f"{select.angle.order.value.lower()} angles in {select.angle.from_}"
        )
        select = select.model_copy(update={"angle": None, "modules": select.modules or list(RANKED)})
    if select is not None and select.fisher is not None:
        notes.append(
            f"of these {select.fisher.fraction:.3g} of the elements, by the Fisher information of "
            f"{select.fisher.samples} rows at the start"
        )
        select = select.model_copy(update={"fisher": None})
    if strategy.type is StrategyType.GREEN and strategy.green is not None:
        notes.append(
            f"Green chooses among these at the start and every {strategy.green.every_steps} steps, for "
            f"{strategy.green.target:.3g} of Full's operations"
        )
    if strategy.unfreezing is not None:
        notes.append("in stages, see strategy.unfreezing")
    return strategy.model_copy(update={"select": select}), notes


def _packed(model: nn.Module) -> set[int]:
    """Identities of the weights that quantisation packs: those of the linear layers of all blocks."""
    parts = (Part(block.name, block.module) for block in Structure.of(model).blocks)
    return {id(linear.module.weight) for part in parts for linear in linears(part)}


def _hold_as_loaded(
    model: nn.Module, strategy: Strategy, compute: torch.dtype, packed: set[int], config: PretrainedConfig
) -> None:
    """Put the precisions right that depend on the numbers, which are not there.

    Packed weights are unpacked into the precision of the passes; a frozen linear layer is held in it where not a bit
    is lost (see strategies.selecting), which is so where the base lies in it.
    """
    whole = isinstance(strategy, ModelStrategy) and config.dtype is compute
    frozen = {id(part.weight) for part in model.modules() if whole and is_linear(part)} - _shared(model)
    for parameter in model.parameters():
        if id(parameter) in packed or (id(parameter) in frozen and not parameter.requires_grad):
            parameter.data = parameter.data.to(compute)


def _shared(model: nn.Module) -> set[int]:
    """Identities of the weights of everything that is no linear layer."""
    others = (module for module in model.modules() if not is_linear(module))
    return {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
