"""Additive: new blocks between frozen ones, and perhaps a head of its own; a whole model is delivered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune_api.selection import ModuleKind
from finetune_api.strategy import AdditiveOptions, StrategySpec
from finetune_trainer.errors import UsageError
from finetune_trainer.expansion import Expanded, NotExpandableError, expand
from finetune_trainer.loaded import lies_in
from finetune_trainer.strategies.base import ModelStrategy
from finetune_trainer.strategies.selecting import hold_small
from finetune_trainer.structure import Structure
from finetune_trainer.tensors import Located
from finetune_trainer.verification import TRAIN_MORE, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.loaded import Loaded

FIELD = "spec.strategy.additive"
ROUNDING = 1e-5
"""Largest difference of two answers, as a share of the largest logit, that kernels may make by adding differently."""


class Additive(ModelStrategy):
    """New blocks that begin as the identity (LLaMA Pro, Wu et al., 2024); everything that was there stays as it was."""

    def __init__(self, spec: StrategySpec) -> None:
        super().__init__(spec)
        self._zeroed: list[str] = []
        self._untied: tuple[str, ...] = ()
        self._model: PreTrainedModel

    @property
    def options(self) -> AdditiveOptions:
        assert self.spec.additive is not None, "a resolved job has its options"
        return self.spec.additive

    def weights_dtype(self, compute: torch.dtype) -> torch.dtype:
        # The base's own precision is not known yet, and what is frozen must come out bit by bit as it went in.
        return torch.float32

    def prepare(self, base: Loaded) -> PreTrainedModel:
        model, new = base.model, list(base.fresh)
        if self.options.blocks:
            larger = self._expanded(base)
            model, new, self._zeroed = larger.model, [*new, *larger.blocks], larger.zeroed
        if self.options.head:
            self._untied = untie(model)
        places = Structure.of(model).places
        for name, parameter in model.named_parameters():
            in_head = self.options.head and places[name].kind is ModuleKind.HEAD
            parameter.requires_grad_(in_head or lies_in(name, new))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(
                f"{FIELD}: nothing would learn: there are no new blocks, and the model has its head already",
                "set additive.head to true, or additive.blocks to at least 1",
            )
        hold_small(model, base.compute)
        self._model = model
        return model

    def _expanded(self, base: Loaded) -> Expanded:
        advice = "use LoRA or Partial, or set additive.blocks to 0: then a new head alone learns"
        try:
            larger = expand(base.model, self.options.blocks, self.options.placement)
        except NotExpandableError as error:
            raise UsageError(f"{FIELD}.blocks: {error}", advice) from error
        if base.weightless:
            return larger
        before = _answer(base.model, base)
        difference = (_answer(larger.model, base) - before).abs().max()
        if not difference <= ROUNDING * before.abs().max():
            raise UsageError(
                f"{FIELD}.blocks: new blocks of {type(base.model).__name__} cannot begin as the identity: with them it "
                "answers differently, as models do that normalise after the residual addition (BERT) or scale by a "
                "block's number",
                advice,
            )
        return larger

    def refuse_untrained(self, base: Path, delivered: Path) -> None:
        if self._zeroed:
            weights = [f"{name}.weight" for name in self._zeroed]
            same = not any(tensor.norm() > 0 for tensor in self._read(delivered, weights))
        elif self._untied:
            head, embedding = self._read(delivered, self._untied)
            same = not (head - embedding).norm() > 0
        else:
            super().refuse_untrained(base, delivered)
            return
        if same:
            raise VerificationError("the delivered model does what its base does: what is new is as it was", TRAIN_MORE)

    def _read(self, folder: Path, names: Iterable[str]) -> Iterator[torch.Tensor]:
        """Tensors by the names of the model's parameters; in files they may have others."""
        located = Located(self._model, folder)
        return (located[key] for name in names for key in located.keys[name])


@torch.no_grad()
def _answer(model: PreTrainedModel, base: Loaded) -> torch.Tensor:
    """Logits for a training row."""
    (row,) = base.examples(1)
    module: nn.Module = model
    module.to(base.device).eval()
    given = {name: value for name, value in row.items() if name != "labels"}
    moved = {name: value.to(base.device) if torch.is_tensor(value) else value for name, value in given.items()}
    answer: torch.Tensor = model(**moved).logits
    return answer


def untie(model: PreTrainedModel) -> tuple[str, ...]:
    """Give an output head that shares the embedding's weights a copy of its own; the names of both, if it did."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return ()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return names[id(head.weight)], names[id(table.weight)]
