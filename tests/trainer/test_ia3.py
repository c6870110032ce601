"""IA3: factors that begin as 1, on what the structure of a model says, and that can be merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from finetune_trainer.errors import UsageError
from finetune_trainer.tensors import Located
from finetune_trainer.verification import VerificationError
from tests.support.architectures import (
    timm_model,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_resnet,
    tiny_vit,
)
from tests.support.jobs import a_job, a_session, run
from tests.support.models import changed, state_of
from tests.support.prepared import a_batch, a_strategy, answer, delivered, learn, loaded

IDS = {"input_ids": torch.arange(4, 40)[None]}
# Modules whose outputs get factors, and those whose inputs do; what of the base is new.
FAMILIES = {
    "Llama": (tiny_llama, {"self_attn.k_proj", "self_attn.v_proj"}, {"mlp.down_proj"}, ()),
    "Llama that classifies": (lambda: tiny_llama(3), {"self_attn.k_proj", "self_attn.v_proj"}, {"mlp.down_proj"},
                              ("score",)),
    "BERT": (tiny_bert, {"attention.self.key", "attention.self.value"}, {"output.dense"}, ("classifier",)),
    "GPT-2": (tiny_gpt2, {"attn.c_attn"}, {"mlp.c_proj"}, ()),
    "ViT": (tiny_vit, {"attention.k_proj", "attention.v_proj"}, {"mlp.fc2"}, ("classifier",)),
}  # fmt: skip
OTHERS = {
    "timm's ViT": (lambda: timm_model("vit_tiny_patch16_224"), {"attn.qkv"}, {"mlp.fc2"}, ("timm_model.head",)),
    "DistilBERT": (lambda: DistilBertForSequenceClassification(
                       DistilBertConfig(vocab_size=272, dim=32, hidden_dim=64, n_layers=2, n_heads=4)),
                   {"attention.k_lin", "attention.v_lin"}, {"ffn.lin2"}, ("pre_classifier", "classifier")),
    "Mixtral": (tiny_mixtral, {"self_attn.k_proj", "self_attn.v_proj"}, set(), ()),
}  # fmt: skip


def factors(model) -> dict[str, bool]:
    """Names of the modules that have factors, and whether these multiply inputs."""
    return {name: module.is_feedforward for name, module in model.named_modules() if isinstance(module, IA3Layer)}


@pytest.mark.parametrize("task", ["Instruction", "CausalLM"])
def test_a_job_lowers_the_loss_and_delivers_adapter_and_merged_model(tmp_path, task):
    job = a_job(tmp_path, "IA3", task, hyperparameters={"learningRate": 0.1}, output={"merge": True})
    result = run(job, tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] - 0.05
    folder = tmp_path / "out/adapter"
    assert (folder / "adapter_model.safetensors").stat().st_size < 8192
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = answer(base, IDS)
    adapted = PeftModel.from_pretrained(base, str(folder))
    assert not torch.allclose(before, answer(adapted, IDS), atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.allclose(answer(merged, IDS), answer(adapted, IDS), atol=1e-4)


def test_exactly_the_factors_move(tmp_path):
    session = a_session(a_job(tmp_path, "IA3"), tmp_path / "scratch")
    before = state_of(session.trainer.model)
    session.trainer.train()
    assert changed(before, state_of(session.trainer.model)) == {name for name in before if "ia3_l" in name}


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
def test_keys_values_and_the_end_of_the_feed_forward_are_found_by_structure(family):
    build, outputs, inputs, fresh = (FAMILIES | OTHERS)[family]
    base = build()
    names = [name for name, _ in base.named_modules()]
    model = a_strategy("IA3").prepare(loaded(base, fresh))
    found = {name.removeprefix("base_model.model."): given for name, given in factors(model).items()}
    expected = {name: False for name in names if name.endswith(tuple(outputs))} | {
        name: True
        for name in names
        if inputs and name.endswith(tuple(f".{n}" for n in inputs)) and ".attention." not in name
    }
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_begins_as_its_base_learns_comes_back_and_merges(tmp_path, family, dtype):
    build, _, _, fresh = FAMILIES[family]
    base, strategy = build().to(dtype), a_strategy("IA3")
    batch = a_batch(base)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    base.save_pretrained(tmp_path / "base")
    again, before = copy.deepcopy(base), answer(base, batch)
    for name in fresh:
        again.get_submodule(name).weight.data.normal_()
    model = strategy.prepare(loaded(base, fresh))
    assert torch.equal(answer(model, batch), before)
    state = state_of(model)
    learn(model, batch)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed(state, state_of(model)) == learning
    assert {model.get_parameter(name).dtype for name in learning} == {torch.float32}
    expected = answer(model, batch).float()
    close = {"rtol": 0, "atol": (1e-5 if dtype is torch.float32 else 3e-2) * expected.abs().max().item()}
    plain = PeftModel.from_pretrained(again, str(delivered(strategy, model, tmp_path)))
    assert torch.allclose(answer(plain, batch).float(), expected, **close)
    merged = build()
    numbers = strategy.merged(plain, Located(merged, tmp_path / "base"))
    # Tied weights lie there once.
    lacking, _ = merged.load_state_dict(numbers.take(list(merged.state_dict())), strict=False)
    assert set(lacking) == set(merged.all_tied_weights_keys)
    merged.to(dtype)
    assert torch.allclose(answer(merged, batch).float(), expected, **close)


def test_named_modules_get_the_factors():
    model = a_strategy("IA3", targetModules=["q_proj", "mlp.down_proj"]).prepare(loaded(tiny_llama()))
    found = {name.rpartition("layers.")[2]: given for name, given in factors(model).items()}
    assert found == {
        "0.self_attn.q_proj": False, "0.mlp.down_proj": True, "1.self_attn.q_proj": False, "1.mlp.down_proj": True,
    }  # fmt: skip


def test_convolutions_take_factors_when_they_are_named(tmp_path):
    base, strategy = tiny_resnet(), a_strategy("IA3", targetModules=["convolution"])
    model, batch = strategy.prepare(loaded(base, ("classifier.1",))), a_batch(base)
    learn(model, batch)
    moved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved if "ia3_l" in name} == {"ia3_l"}
    assert sum("classifier" in name for name in moved) == 2


REFUSED = {
    "no attention": (tiny_resnet, [], "ResNetForImageClassification has no blocks with attention", "convolution"),
    "no such module": (tiny_llama, ["query"], "no module of the model is called query", "q_proj, k_proj"),
    "a norm": (tiny_llama, ["input_layernorm"], "is a LlamaRMSNorm", "q_proj, k_proj"),
    "the output head": (tiny_llama, ["lm_head"], "lm_head is the output head", "q_proj, k_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_takes_no_factors_is_refused(case):
    build, targets, words, way_out = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        a_strategy("IA3", targetModules=targets).prepare(loaded(build()))
    assert caught.value.message.startswith("spec.strategy.ia3.targetModules: ")
    assert words in caught.value.message
    assert way_out in caught.value.advice


def test_untrained_factors_are_not_delivered(tmp_path):
    with pytest.raises(VerificationError, match="changes nothing"):
        run(a_job(tmp_path, "IA3", hyperparameters={"learningRate": 1e-30}), tmp_path / "scratch")


def test_the_file_holds_nothing_but_factors(tmp_path):
    run(a_job(tmp_path, "IA3"), tmp_path / "scratch")
    names = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert len(names) == 6
    assert all(name.endswith("ia3_l") for name in names)
