"""Ranks look for parameters without gradients only where there are some."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune_trainer.learning import await_what_learns
from tests.support.architectures import tiny_bert, tiny_llama


def asks(model: nn.Module) -> bool:
    """Whether ranks look for them in every step."""
    handler = SimpleNamespace(find_unused_parameters=False)
    accelerator = SimpleNamespace(ddp_handler=handler, autocast=nullcontext)
    trainer = SimpleNamespace(model=model, accelerator=accelerator)
    await_what_learns(trainer, lambda model: {"input_ids": torch.arange(4, 12)[None]})
    return handler.find_unused_parameters


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_a_model_that_uses_all_its_parameters_is_not_searched(make):
    assert not asks(make().train())


def test_a_parameter_that_is_never_used_is_looked_for_unless_it_is_frozen():
    model = tiny_llama()
    model.extra = nn.Linear(2, 2)
    assert asks(model)
    model.extra.requires_grad_(False)
    assert not asks(model)


def test_looking_leaves_a_model_as_it_was():
    model = tiny_bert().train()
    drawn = torch.get_rng_state()
    asks(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())
