"""What Green believes that training costs is what torch's FLOP counter finds in the backward pass."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.learning import learn
from finetune_trainer.strategies.green.costs import Costs
from finetune_trainer.strategies.green.meter import measure
from finetune_trainer.strategies.green.operations import UNCOUNTED
from tests.support.architectures import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_resnet, tiny_vit

IDS = torch.arange(4, 52).reshape(2, 24)
CLASSES = torch.tensor([0, 1])
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "labels": CLASSES}
MODELS = {
    "Llama": (tiny_llama, TEXT | {"labels": IDS}),
    "Llama with a tied head": (lambda **config: tiny_llama(tie_word_embeddings=True, **config), TEXT | {"labels": IDS}),
    "BERT": (tiny_bert, TEXT | {"labels": CLASSES}),
    "GPT-2": (tiny_gpt2, TEXT | {"labels": IDS}),
    "ViT": (tiny_vit, IMAGES),
}


def counted(model: nn.Module, loss, names: Collection[str]) -> int:
    """FLOPs of the backward pass when these learn."""
    learn(model, names)
    value = loss()
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        value.backward()
    model.zero_grad()
    return counter.get_total_flops()


def selections(costs: Costs) -> list[np.ndarray]:
    """Everything, the upper parts, and random ones."""
    count, random = len(costs.names), np.random.default_rng(0)
    upper = [np.arange(count) >= count * part for part in (0, 0.3, 0.6)]
    return upper + [random.random(count) < share for share in (0.5, 0.2)]


def compare(model: nn.Module, loss) -> None:
    costs = measure(model, loss)
    assert set(costs.names) == {name for name, _ in model.named_parameters()}
    for mask in selections(costs):
        names = {name for name, chosen in zip(costs.names, mask, strict=True) if chosen}
        # Sums over biases and norms are in the costs, and not in what torch counts.
        assert counted(model, loss, names) == pytest.approx(costs.backward(mask), rel=0.03)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_the_costs_of_any_selection_are_those_of_its_backward_pass(name, attention):
    make, batch = MODELS[name]
    model = make(attn_implementation=attention).train()
    compare(model, lambda: model(**batch).loss)


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_of_blocks_is_part_of_the_costs(name):
    make, batch = MODELS[name]
    model = make().train()
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()
    plain = measure(make().train(), lambda: make().train()(**batch).loss)
    compare(model, lambda: model(**batch).loss)
    assert measure(model, lambda: model(**batch).loss).full > 1.1 * plain.full


def test_shortcuts_and_convolutions_are_understood():
    model = tiny_resnet().train()
    compare(model, lambda: model(**IMAGES).loss)


def test_a_head_that_is_computed_again_in_the_backward_pass_is_paid_for():
    model = tiny_llama().train()
    add_fused_lm_head(model)
    compare(model, lambda: model(**TEXT, labels=IDS, fused_lm_head=True).loss)


def test_experts_are_not_free():
    model = tiny_mixtral().train()
    compare(model, lambda: model(input_ids=IDS, labels=IDS).loss)


def test_mixed_precision_costs_the_same():
    model = tiny_llama().train()

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**TEXT, labels=IDS).loss

    compare(model, loss)


def test_a_tied_head_costs_both_its_uses_and_the_way_down_to_the_embedding():
    model = tiny_llama(tie_word_embeddings=True).train()
    costs = measure(model, lambda: model(**TEXT, labels=IDS).loss)
    tokens, width, words = IDS.numel(), 64, 272
    place = costs.names.index("model.embed_tokens.weight")
    assert place == 0
    assert costs.own[place] == 2 * tokens * width * words + tokens * width
    assert costs.alone()[place] > costs.full - costs.forward - costs.own.sum()


def test_the_forward_pass_is_counted_as_torch_counts_it():
    model = tiny_llama().train()
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        model(**TEXT)
    assert counter.get_total_flops() == pytest.approx(
        measure(model, lambda: model(**TEXT, labels=IDS).loss).forward, rel=0.01
    )


def test_a_linear_layer_costs_what_its_shapes_say():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    costs = measure(model, lambda: model(torch.randn(5, 8)).sum())
    own = dict(zip(costs.names, costs.own, strict=True))
    assert own == {"0.weight": 2 * 5 * 8 * 16, "0.bias": 5 * 16, "2.weight": 2 * 5 * 16 * 4, "2.bias": 5 * 4}
    # The way to the first layer leads through the second; nothing below the first layer asks for a gradient.
    assert costs.passing[:2].sum() == 2 * 5 * 16 * 4
    assert costs.passing[2:].sum() == 0
