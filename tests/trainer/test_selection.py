"""The language of selections: what is meant, and what is refused with the way out."""

from __future__ import annotations

import pytest

from finetune_api.selection import Layers, ModelPart, ModuleKind
from finetune_trainer.errors import UsageError
from finetune_trainer.selection import chosen
from finetune_trainer.structure import Structure
from tests.support.architectures import tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet

FIELD = "spec.strategy.select"
BERT = Structure.of(tiny_bert())
PARTS = {
    "the first block": ({"layers": {"first": 1}}, lambda name: "layer.0." in name),
    "the last two blocks": ({"layers": {"last": 2}}, lambda name: "layer.1." in name or "layer.2." in name),
    "blocks by number": ({"layers": {"indices": [2, 0]}}, lambda name: "layer.0." in name or "layer.2." in name),
    "all blocks": ({"layers": {"last": 3}}, lambda name: ".layer." in name),
    "one kind, wherever it lies": ({"modules": ["LayerNorm"]}, lambda name: "LayerNorm" in name),
    "kinds outside of blocks": (
        {"modules": ["Embedding", "Head"]},
        lambda name: ("embeddings" in name and "LayerNorm" not in name) or "pooler" in name or "classifier" in name,
    ),
    "a kind in some blocks": (
        {"layers": {"last": 1}, "modules": ["Attention"]},
        lambda name: "layer.2.attention" in name and "LayerNorm" not in name,
    ),
    "blocks, and a kind that lies outside of them": (
        {"layers": {"last": 1}, "modules": ["FeedForward", "Head"]},
        lambda name: (
            (("layer.2.output" in name or "layer.2.intermediate" in name) and "LayerNorm" not in name)
            or "pooler" in name
            or "classifier" in name
        ),
    ),
    "norms of blocks and those outside": (
        {"layers": {"first": 1}, "modules": ["LayerNorm"]},
        lambda name: "LayerNorm" in name and (".layer." not in name or "layer.0." in name),
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_is_what_it_says(case):
    part, expected = PARTS[case]
    assert chosen(BERT, ModelPart.from_wire(part), FIELD) == {name for name in BERT.places if expected(name)}


REFUSED = {
    "a block that is not there": (
        tiny_llama,
        {"layers": {"indices": [0, 40]}},
        "spec.strategy.select.layers.indices: there is no block 40; the model has blocks 0 to 1",
        "count from 0",
    ),
    "more blocks than there are": (
        tiny_llama,
        {"layers": {"last": 3}},
        "spec.strategy.select.layers.last is 3, but the model has only 2 blocks",
        "use 2",
    ),
    "layer norms of a model with batch norms": (
        tiny_resnet,
        {"modules": ["LayerNorm"]},
        "spec.strategy.select.modules: the model has no LayerNorm (its norms are BatchNorm2d)",
        "use Head (such as classifier.1); or layers with blocks 0 to 3",
    ),
    "attention of convolutions": (
        tiny_resnet,
        {"modules": ["Attention"]},
        "spec.strategy.select.modules: the model has no Attention",
        "layers with blocks 0 to 3",
    ),
    "a head that shares the embedding": (
        tiny_gpt2,
        {"modules": ["Head"]},
        "the model has no Head of its own (its output shares the weights of Embedding)",
        "Embedding (such as transformer.wte)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_does_not_have_is_refused_with_the_way_out(case):
    build, part, message, advice = REFUSED[case]
    with pytest.raises(UsageError) as refusal:
        chosen(Structure.of(build()), ModelPart.from_wire(part), FIELD)
    assert message in refusal.value.message
    assert advice in refusal.value.advice


def test_a_kind_that_the_chosen_blocks_lack_is_refused():
    structure = Structure.of(tiny_llama())
    for block in structure.blocks[:1]:
        block.module.mlp = None
    part = ModelPart(layers=Layers(first=1), modules=[ModuleKind.FEED_FORWARD])
    with pytest.raises(UsageError, match="blocks 0 have no FeedForward"):
        chosen(Structure.of(structure.model), part, FIELD)
