"""Additive: blocks that begin as the identity between frozen ones, in a model that plain transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from finetune_api.strategy import BlockPlacement
from finetune_trainer.errors import UsageError
from finetune_trainer.expansion import sources
from finetune_trainer.verification import VerificationError
from tests.support.architectures import (
    SEQUENCE,
    timm_model,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_resnet,
    tiny_vit,
)
from tests.support.jobs import a_job, a_session, run
from tests.support.models import changed, save_tiny_llama, state_of
from tests.support.prepared import a_batch, a_strategy, answer, delivered, learn, loaded

LAST, INTERLEAVED = BlockPlacement.LAST, BlockPlacement.INTERLEAVED
IDS = {"input_ids": torch.arange(4, 40)[None]}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("count", "blocks", "placement", "expected"),
    [
        (4, 2, INTERLEAVED, [0, 1, 1, 2, 3, 3]),
        (4, 4, INTERLEAVED, [0, 0, 1, 1, 2, 2, 3, 3]),
        (5, 2, INTERLEAVED, [0, 1, 2, 2, 3, 4, 4]),
        (3, 1, INTERLEAVED, [0, 1, 2, 2]),
        (2, 4, INTERLEAVED, [0, 0, 0, 1, 1, 1]),
        (3, 2, LAST, [0, 1, 2, 2, 2]),
    ],
)
def test_copies_stand_after_their_sources(count, blocks, placement, expected):
    assert sources(count, blocks, placement) == expected


def gemma(**changes):
    """Six blocks, every third of which attends to everything and the others to a window."""
    torch.manual_seed(0)
    settings = {"head_dim": 8, "num_hidden_layers": 6, "sliding_window": 4, "sliding_window_pattern": 3}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SEQUENCE | SMALL | settings | changes))


FAMILIES = {
    "Llama": (tiny_llama, (), AutoModelForCausalLM),
    "Llama with a tied head": (lambda: tiny_llama(tie_word_embeddings=True), (), AutoModelForCausalLM),
    "Llama that classifies": (lambda: tiny_llama(3), ("score",), AutoModelForSequenceClassification),
    "GPT-2": (tiny_gpt2, (), AutoModelForCausalLM),
    "Gemma 3": (gemma, (), AutoModelForCausalLM),
    "ViT": (tiny_vit, ("classifier",), AutoModelForImageClassification),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_placement = pytest.mark.parametrize("placement", ["Interleaved", "Last"])


@every_placement
@every_family
def test_a_larger_model_begins_as_its_base_learns_and_comes_back(tmp_path, family, placement):
    build, fresh, loader = FAMILIES[family]
    base, strategy = build(), a_strategy("Additive", blocks=2, placement=placement)
    batch, count = a_batch(base), base.config.num_hidden_layers
    before = answer(base, batch)
    model = strategy.prepare(loaded(base, fresh))
    assert model.config.num_hidden_layers == count + 2
    assert torch.equal(answer(model, batch), before)
    state = state_of(model)
    learn(model, batch)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed(state, state_of(model)) == learning
    assert not torch.allclose(answer(model, batch), before, atol=1e-3)
    again = loader.from_pretrained(delivered(strategy, model, tmp_path))
    assert torch.equal(answer(again, batch), answer(model, batch))


def test_new_blocks_learn_and_nothing_else(tmp_path):
    session = a_session(a_job(tmp_path, "Additive", additive={"blocks": 1, "placement": "Last"}), tmp_path / "scratch")
    model = session.trainer.model
    before = state_of(model)
    session.trainer.train()
    assert changed(before, state_of(model)) == {name for name in before if name.startswith("model.layers.2.")}


def test_lists_of_the_configuration_grow_with_the_blocks():
    base = gemma()
    kinds = list(base.config.layer_types)
    model = a_strategy("Additive", blocks=2).prepare(loaded(base))
    assert model.config.layer_types == [*kinds[:3], kinds[2], *kinds[3:], kinds[5]]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(8))
    assert list(base.config.layer_types) == kinds, "the base's own configuration stays"


@every_placement
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, gemma], ids=["Llama", "GPT-2", "Gemma 3"])
def test_a_larger_model_generates_with_its_cache(build, placement):
    base = build()
    model = a_strategy("Additive", blocks=2, placement=placement).prepare(loaded(base))
    learn(model, a_batch(base), steps=4, rate=0.1)
    model.eval()
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    found = [model.generate(**IDS, attention_mask=IDS["input_ids"] * 0 + 1, use_cache=cache, **settings)
             for cache in (True, False)]  # fmt: skip
    assert torch.equal(*found)
    assert found[0].shape == (1, 44)


@pytest.mark.parametrize("task", ["Instruction", "CausalLM"])
@pytest.mark.parametrize("options", [{}, {"blocks": 1, "placement": "Last", "head": True}], ids=str)
def test_a_job_lowers_the_loss_and_delivers_a_model_that_transformers_loads(tmp_path, options, task):
    result = run(a_job(tmp_path, "Additive", task, additive=options), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert model.config.num_hidden_layers == 2 + options.get("blocks", 2)
    trained = load_file(tmp_path / "out/checkpoints/step-00000006/trainable.safetensors")
    weights = load_file(tmp_path / "out/model/model.safetensors")
    assert trained.keys() < weights.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    base = load_file(tmp_path / "model/model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert "library_name: transformers" in (tmp_path / "out/model/README.md").read_text()


def test_what_was_there_is_delivered_bit_by_bit_in_its_own_precision(tmp_path):
    save_tiny_llama(tmp_path / "model", torch.bfloat16)
    job = a_job(tmp_path, "Additive", additive={"blocks": 1, "placement": "Last"}, model={"dtype": "bfloat16"})
    run(job, tmp_path / "scratch")
    base, found = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "out/model/model.safetensors")
    assert changed(base, found) == set()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert {name.split(".")[2] for name in found.keys() - base.keys()} == {"2"}


def test_a_head_that_shares_the_embedding_gets_weights_of_its_own(tmp_path):
    save_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    run(a_job(tmp_path, "Additive", additive={"blocks": 0, "head": True}), tmp_path / "scratch")
    base, found = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "out/model/model.safetensors")
    assert changed(base, found) == set()
    assert found.keys() - base.keys() == {"lm_head.weight"}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])


@pytest.mark.parametrize(
    ("build", "fresh", "head"),
    [(tiny_bert, ["classifier"], "classifier."), (tiny_resnet, ["classifier.1"], "classifier.1."),
     (lambda: timm_model("vit_tiny_patch16_224"), ["timm_model.head"], "timm_model.head.")],
    ids=["BERT", "ResNet", "timm's ViT"],
)  # fmt: skip
def test_a_new_head_alone_goes_with_every_architecture(build, fresh, head):
    model = a_strategy("Additive", blocks=0).prepare(loaded(build(), fresh))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{head}weight", f"{head}bias"}


def test_a_head_that_the_base_has_learns_when_it_is_asked_for():
    model = a_strategy("Additive", blocks=0, head=True).prepare(loaded(tiny_bert()))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in learning} == {"bert.pooler.dense", "classifier"}


def trained_bert():
    """A BERT whose norms are no longer those of the beginning, which happen to be idempotent."""
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.data.normal_(1.0, 0.2)
    return model


REFUSED = {
    "BERT normalises what it has added": (
        trained_bert, {}, "additive.blocks: new blocks of BertForSequenceClassification cannot begin as the identity"),
    "GPT-2 may scale by the number of a block": (
        lambda: tiny_gpt2(scale_attn_by_inverse_layer_idx=True), {}, "or scale by a block's number"),
    "ResNet has several rows of blocks": (tiny_resnet, {}, "is not one row of blocks"),
    "timm's models have a size by their name": (
        lambda: timm_model("vit_tiny_patch16_224"), {}, "is not one row of blocks"),
    "a mixture of experts has no single last layer": (
        tiny_mixtral, {},
        "no single last layer of their attention and of their feed-forward"),
    "nothing would learn": (tiny_bert, {"blocks": 0}, "nothing would learn: there are no new blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_grow_is_refused_with_a_way_out(case):
    build, options, words = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        a_strategy("Additive", **options).prepare(loaded(build()))
    assert caught.value.message.startswith("spec.strategy.additive")
    assert words in caught.value.message
    assert "blocks to " in caught.value.advice


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"placement": "Last"}, {"blocks": 0, "head": True}], ids=str)
def test_a_model_that_does_what_its_base_does_is_not_delivered(tmp_path, options, tied):
    save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    with pytest.raises(VerificationError, match="base"):
        run(
            a_job(tmp_path, "Additive", additive=options, hyperparameters={"learningRate": 1e-30}), tmp_path / "scratch"
        )
    assert not (tmp_path / "out/result.json").exists()
