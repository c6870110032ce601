"""What prompt and prefix tuning have in common: virtual tokens beside a model that stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune_trainer.errors import UsageError
from finetune_trainer.strategies.peft import PeftStrategy

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, Trainer

    from finetune_trainer.loaded import Loaded

FIELD = "spec.strategy.type"
INSTEAD = "use LoRA, IA3 or Adapter"


class VirtualTokensStrategy(PeftStrategy):
    """Vectors that are learned, and that the model meets before every row."""

    hooks: list[RemovableHandle]
    """On the base, for as long as it is trained."""
    _untrained: torch.Tensor
    """The vectors as training begins with them; the same after a restart, since the seed is."""

    def prepare(self, base: Loaded) -> PreTrainedModel:
        try:
            model = cast("PeftModel", super().prepare(base))
            self.hooks = count_positions(model)
            if not base.weightless:
                self.begin(model, base)
                refuse_without_effect(model)
                self._untrained = model.get_prompt_embedding_to_save("default")
        except torch.OutOfMemoryError:
            raise
        # Architectures differ in whether they take embeddings and caches from outside; there is no list of them.
        except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            raise UsageError(
                f"{FIELD}: {type(base.model).__name__} does not take the virtual tokens of {self.spec.type.value}: "
                f"{error}",
                INSTEAD,
            ) from error
        return cast("PreTrainedModel", model)

    def begin(self, model: PeftModel, base: Loaded) -> None:
        """Give the virtual tokens their first values, where PEFT's are not ours."""

    @contextmanager
    def absent(self, model: PreTrainedModel) -> Iterator[None]:
        # PEFT's own way asks every model how it generates, and classifiers do not.
        base = cast("PeftModel", model).get_base_model()
        hidden = [name for name in ("forward", "generate") if hasattr(base, name)]
        for name in hidden:
            setattr(model, name, getattr(base, name))
        try:
            yield
        finally:
            for name in hidden:
                delattr(model, name)

    def attach(self, trainer: Trainer) -> None:
        base = cast("PeftModel", trainer.model).get_base_model()
        if trainer.args.neftune_noise_alpha is not None and not hasattr(base, "model"):
            raise UsageError(
                f"spec.hyperparameters.neftuneAlpha does not reach the embeddings of {type(base).__name__} under "
                f"{self.spec.type.value}",
                "remove it",
            )

    def unloaded(self, adapted: PeftModel) -> PreTrainedModel:
        for hook in self.hooks:
            hook.remove()
        return cast("PreTrainedModel", adapted.get_base_model())

    def changes(self, tensors: dict[str, torch.Tensor]) -> bool:
        return not torch.equal(tensors["prompt_embeddings"], self._untrained)


def count_positions(model: PeftModel) -> list[RemovableHandle]:
    """Number the tokens of a row by what is attended to, so that padding on either side moves none of them.

    PEFT leaves that to the model, which numbers what it is given from the first column on: padding on the left, as in
    generation, would stand between the virtual tokens and the text that they are learned for.
    """
    base = model.get_base_model()
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return []

    def count(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask, ids, given = (named.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
        if torch.is_tensor(mask) and mask.ndim == 2 and named.get("position_ids") is None:
            width = (given if given is not None else ids).shape[1]
            named["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        return arguments, named

    return [base.register_forward_pre_hook(count, with_kwargs=True)]


def refuse_without_effect(model: PeftModel) -> None:
    """Raise ValueError when the model's answer does not depend on the virtual tokens; draws no random numbers."""
    learning = list(model.prompt_encoder.parameters())
    ids = torch.arange(1, 4, device=model.device)[None]
    model.eval()
    answer = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    gradients = torch.autograd.grad(answer.float().square().sum(), learning, allow_unused=True)
    model.train()
    if not any(gradient is not None and gradient.norm() > 0 for gradient in gradients):
        raise ValueError("its answer does not depend on them")
