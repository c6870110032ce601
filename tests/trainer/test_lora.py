"""LoRA's finer options, and heads that are new: they learn whole, in float32, under LoRA and QLoRA alike."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig

from finetune_api.job import ModelSpec
from finetune_trainer.errors import UsageError
from finetune_trainer.model import Source, load_config, load_weights
from tests.support.architectures import timm_model, tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet, tiny_vit
from tests.support.jobs import a_job, a_session, run
from tests.support.models import changed, save_tiny_llama, state_of
from tests.support.prepared import a_batch, a_strategy, answer, delivered, learn, loaded


def ranks(model) -> dict[str, int]:
    """Of every adapted module, by the end of its name."""
    return {name.rpartition("layers.")[2]: m.r["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")}


def test_modules_have_the_ranks_of_the_pattern_and_the_longest_name_counts(tmp_path):
    pattern = {"v_proj": 3, "layers.1.self_attn.v_proj": 5, "mlp.down_proj": 2}
    session = a_session(a_job(tmp_path, lora={"rank": 4, "rankPattern": pattern}), tmp_path / "scratch")
    found = ranks(session.trainer.model)
    assert found.pop("0.self_attn.v_proj") == 3
    assert found.pop("1.self_attn.v_proj") == 5
    assert {found.pop("0.mlp.down_proj"), found.pop("1.mlp.down_proj")} == {2}
    assert len(found) == 10
    assert set(found.values()) == {4}


def test_an_adapter_of_several_ranks_is_delivered_and_merged(tmp_path):
    lora = {"rank": 4, "targetModules": ["q_proj", "v_proj"], "rankPattern": {"v_proj": 16}}
    result = run(a_job(tmp_path, lora=lora, output={"merge": True}), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"]
    assert result.trainable_parameters == 2 * (4 * (64 + 64) + 16 * (64 + 32))


@pytest.mark.parametrize("pattern", [{"query": 4}, {"lm_head": 4}, {"v_proj|q_proj": 4}], ids=str)
def test_a_rank_for_a_module_without_an_adapter_is_refused(pattern):
    with pytest.raises(UsageError, match="rankPattern: no module with an adapter is called") as caught:
        a_strategy("LoRA", rankPattern=pattern).prepare(loaded(tiny_llama()))
    assert "q_proj, k_proj" in caught.value.advice


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
def test_whole_modules_of_a_bfloat16_base_learn_in_float32(tmp_path, module, tied):
    save_tiny_llama(tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied)
    job = a_job(tmp_path, lora={"modulesToSave": [module]}, model={"dtype": "bfloat16"}, output={"merge": True})
    result = run(job, tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] - 0.2
    found = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert any(module in name for name in found)


HEADS = {
    "BERT": (tiny_bert, ("classifier",), {}),
    "BERT without a pooler": (tiny_bert, ("bert.pooler", "classifier"), {}),
    "Llama": (lambda: tiny_llama(3), ("score",), {}),
    "ViT": (tiny_vit, ("classifier",), {}),
    "ResNet": (tiny_resnet, ("classifier.1",), {"targetModules": ["convolution"]}),
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_heads_learn_whole_in_float32_and_come_back(tmp_path, family, dtype):
    build, fresh, options = HEADS[family]
    base, strategy = build().to(dtype), a_strategy("LoRA", **options)
    again, batch = copy.deepcopy(base), a_batch(base)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    for name in fresh:
        for parameter in again.get_submodule(name).parameters():
            parameter.data.normal_()
    model = strategy.prepare(loaded(base, fresh))
    before = state_of(model)
    learn(model, batch)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in learning if "modules_to_save" in name}
    assert {name.partition(".modules_to_save")[0] for name in heads} == {f"base_model.model.{name}" for name in fresh}
    assert not any("lora" in name for name in heads)
    assert (
        changed(before, state_of(model)) - {name for name in before if "running" in name or "num_b" in name} == learning
    )
    assert {model.get_parameter(name).dtype for name in learning} == {torch.float32}
    expected = answer(model, batch).float()
    plain = PeftModel.from_pretrained(again, str(delivered(strategy, model, tmp_path))).eval()
    close = {"rtol": 0, "atol": (1e-5 if dtype is torch.float32 else 3e-2) * expected.abs().max().item()}
    if family != "ResNet":  # whose running statistics have moved, since only the session holds them
        assert torch.allclose(answer(plain, batch).float(), expected, **close)


QUANTISED = {
    "BERT": (lambda: tiny_bert(hidden_size=64, intermediate_size=128), "AutoModelForSequenceClassification",
             {"bert.pooler.dense", "classifier"}, 18),
    "Llama": (lambda: tiny_llama(2), "AutoModelForSequenceClassification", {"score"}, 14),
    "Llama that speaks": (tiny_llama, "AutoModelForCausalLM", {"lm_head"}, 14),
    "GPT-2": (lambda: tiny_gpt2(n_embd=64), "AutoModelForCausalLM", {"lm_head"}, 12),
    "ViT": (lambda: tiny_vit(hidden_size=64, intermediate_size=128), "AutoModelForImageClassification",
            {"classifier"}, 18),
}  # fmt: skip


def quantised(folder, family):
    build, loader, _, _ = QUANTISED[family]
    build().save_pretrained(folder)
    spec = ModelSpec(uri=f"file://{folder}")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    source = Source(folder, spec, load_config(folder, spec), torch.float32, "sdpa", quantization)
    return load_weights(source, loader).model


@pytest.mark.parametrize("family", QUANTISED)
def test_what_lies_outside_of_the_blocks_is_not_quantised(tmp_path, family):
    _, _, whole, count = QUANTISED[family]
    linear = {
        name: type(m).__name__ for name, m in quantised(tmp_path, family).named_modules() if isinstance(m, nn.Linear)
    }
    assert {name for name, kind in linear.items() if kind != "Linear4bit"} == whole
    assert list(linear.values()).count("Linear4bit") == count


@pytest.mark.parametrize("family", ["BERT", "Llama", "ViT"])
def test_a_new_head_over_a_quantised_base_learns_whole(tmp_path, family):
    base = quantised(tmp_path, family)
    head = "score" if family == "Llama" else "classifier"
    model, batch = a_strategy("QLoRA").prepare(loaded(base, (head,))), a_batch(base)
    before = state_of(model)
    learn(model, batch)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert f"base_model.model.{head}.modules_to_save.default.weight" in learning
    assert learning <= changed(before, state_of(model))
    assert {model.get_parameter(name).dtype for name in learning} == {torch.float32}


def test_all_linear_leaves_out_a_new_head_by_its_whole_name():
    model = a_strategy("LoRA").prepare(loaded(timm_model("vit_tiny_patch16_224"), ("timm_model.head",)))
    assert not any("head" in name for name, _ in model.named_parameters() if "lora" in name)
