"""IA3: learned factors on activations of a frozen base, delivered as an adapter of kilobytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from finetune_trainer.errors import UsageError
from finetune_trainer.loaded import lies_in
from finetune_trainer.strategies.peft import PeftStrategy
from finetune_trainer.strategies.targets import convolution_names, linear_names, matching, refuse_unknown_targets
from finetune_trainer.structure import Block, Structure
from finetune_trainer.structure.modules import linears

if TYPE_CHECKING:
    from peft import IA3Config
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Loaded

FIELD = "spec.strategy.ia3.targetModules"
KEY_OR_VALUE = re.compile(r"^(k|key|v|value)($|_)")


class IA3(PeftStrategy):
    """Factors on keys, values and the inner activations of the feed-forward (Liu et al., 2022)."""

    def config(self, base: Loaded) -> IA3Config:
        from peft import IA3Config
        from transformers.pytorch_utils import Conv1D

        targets, scaled_inputs = self._targets(base)
        return IA3Config(
            task_type=base.peft_task,
            target_modules=[*targets, *scaled_inputs],
            feedforward_modules=scaled_inputs,
            exclude_modules=list(base.fresh) or None,
            modules_to_save=_layers(base) or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.model.modules()),
        )

    def _targets(self, base: Loaded) -> tuple[list[str], list[str]]:
        """Endings of names: of modules whose outputs get factors, and of those whose inputs do."""
        assert self.spec.ia3 is not None, "a resolved job has its options"
        model, named = base.model, self.spec.ia3.target_modules
        refuse_unknown_targets(model, named, FIELD, base.fresh)
        blocks = Structure.of(model).blocks
        last = {block.feed_forward_output.name for block in blocks if block.feed_forward_output}
        if named:
            chosen = {name for target in named for name in matching(model, target) if not lies_in(name, base.fresh)}
        else:
            chosen = last | {name for block in blocks for name in keys_and_values(block)}
        if not chosen:
            lacking = f"{type(model).__name__} has no blocks with attention and feed-forward"
            names = [*linear_names(model, base.fresh), *convolution_names(model)]
            raise UsageError(f"{FIELD}: {lacking}", f"name some of: {', '.join(names)}")
        return endings(chosen - last, model), endings(chosen & last, model)

    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        factors = [tensor for name, tensor in tensors.items() if "ia3_l" in name]
        return any(bool((tensor != 1).any()) for tensor in factors)


def _layers(base: Loaded) -> list[str]:
    """The single layers of what is new: PEFT cannot take IA3 apart again where a module of several is saved whole."""
    return [
        name
        for name, module in base.model.named_modules()
        if lies_in(name, base.fresh) and next(module.parameters(recurse=False), None) is not None
    ]


def keys_and_values(block: Block) -> list[str]:
    """Names of the linear layers that project keys and values; where one layer projects queries too, that one."""
    inside = [linear.name for part in block.attention for linear in linears(part)]
    separate = [name for name in inside if KEY_OR_VALUE.search(name.rpartition(".")[2])]
    output = block.attention_output.name if block.attention_output else None
    return separate or [name for name in inside if name != output]


def endings(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """The shortest endings that these modules' names have and no other's: they stand in the adapter's config."""
    wanted = set(names)
    others = [name for name, _ in model.named_modules() if name not in wanted]
    for length in range(1, 1 + max((name.count(".") for name in wanted), default=0)):
        found = {".".join(name.split(".")[-length:]) for name in wanted}
        # As PEFT compares them: without regard to where a part of a name begins.
        if not any(other.endswith(tuple(found)) for other in others):
            return sorted(found)
    return sorted(wanted)
