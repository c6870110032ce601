"""Adapter: bottlenecks that begin as nothing, learn alone, and come back from their folder by our loader."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_trainer import verification
from finetune_trainer.adapters import load_adapter
from finetune_trainer.errors import UsageError
from finetune_trainer.verification import VerificationError
from tests.support.architectures import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_resnet, tiny_vit
from tests.support.jobs import a_job, a_session, run
from tests.support.models import changed, save_tiny_llama, state_of
from tests.support.prepared import a_batch, a_strategy, answer, delivered, learn, loaded

FAMILIES = {
    "Llama": (tiny_llama, (), ["self_attn.o_proj", "mlp.down_proj"], "layernorm"),
    "Llama that classifies": (lambda: tiny_llama(3), ("score",), ["self_attn.o_proj", "mlp.down_proj"], "layernorm"),
    "BERT": (tiny_bert, ("classifier",), ["attention.output.dense", "output.dense"], "layer.*LayerNorm"),
    "GPT-2": (tiny_gpt2, (), ["attn.c_proj", "mlp.c_proj"], "ln_[12]"),
    "ViT": (tiny_vit, ("classifier",), ["attention.o_proj", "mlp.fc2"], "layers.*layernorm"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("task", ["Instruction", "CausalLM"])
@pytest.mark.parametrize("placement", ["Houlsby", "Pfeiffer"])
def test_a_job_delivers_an_adapter_that_lowers_the_loss(tmp_path, placement, task):
    job = a_job(tmp_path, "Adapter", task, adapter={"size": 8, "placement": placement})
    result = run(job, tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] - 0.1
    folder = tmp_path / "out/adapter"
    trained = load_file(tmp_path / "out/checkpoints/step-00000006/trainable.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in found)
    card = (folder / "README.md").read_text()
    assert "library_name: finetune-operator" in card
    assert "from finetune_trainer.adapters import load_adapter" in card
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(4, 40)[None]
    before = answer(base, {"input_ids": ids})
    assert not torch.allclose(before, answer(load_adapter(base, folder), {"input_ids": ids}), atol=1e-3)


CASES = {
    "Houlsby": ({}, lambda name: ".adapter." in name or "layernorm" in name),
    "Pfeiffer": ({"placement": "Pfeiffer"}, lambda name: "down_proj.adapter." in name or "layernorm" in name),
    "without norms": ({"layerNorms": False, "activation": "silu"}, lambda name: ".adapter." in name),
    "in the last block": (
        {"layers": {"last": 1}, "activation": "gelu", "dropout": 0.1},
        lambda name: "layers.1." in name and (".adapter." in name or "layernorm" in name),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_exactly_bottlenecks_and_norms_of_their_blocks_move(tmp_path, case):
    options, declared = CASES[case]
    session = a_session(a_job(tmp_path, "Adapter", adapter=options), tmp_path / "scratch")
    model = session.trainer.model
    before = state_of(model)
    session.trainer.train()
    assert changed(before, state_of(model)) == {name for name in before if declared(name)}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    probe = {"input_ids": torch.arange(4, 40)[None]}
    load_adapter(again, delivered(session.strategy, model, tmp_path / "adapter"))
    assert torch.equal(answer(again, probe), answer(model, probe))


@every_family
def test_an_untrained_adapter_is_the_base_bit_by_bit(family):
    model = FAMILIES[family][0]()
    batch = a_batch(model)
    before = answer(model, batch)
    assert torch.equal(answer(a_strategy("Adapter").prepare(loaded(model)), batch), before)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_learns_and_comes_back(tmp_path, family, dtype):
    build, fresh, places, norms = FAMILIES[family]
    # Of few units with relu all may be dead.
    base, strategy = build().to(dtype), a_strategy("Adapter", size=4, activation="gelu")
    batch = a_batch(base)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    again = copy.deepcopy(base)
    for name in fresh:  # who downloads the adapter has a head with other random numbers
        again.get_submodule(name).weight.data.normal_()
    model = strategy.prepare(loaded(base, fresh))
    before = state_of(model)
    learn(model, batch)
    moved = changed(before, state_of(model))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == learning
    assert {model.get_parameter(name).dtype for name in learning} == {torch.float32}
    folder = delivered(strategy, model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert [name for name in config["modules"] if not any(name.endswith(place) for place in places)] == []
    assert {name for name in config["whole"] if not re.search(norms, name)} == set(fresh)
    assert torch.equal(answer(load_adapter(again, folder), batch), answer(model, batch))


def test_bottlenecks_learn_the_same_with_recomputed_activations():
    gradients = []
    for recompute in (False, True):
        base = tiny_llama()
        torch.manual_seed(1)
        model = a_strategy("Adapter").prepare(loaded(base))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**a_batch(base)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(gradient is not None for gradient in gradients[0])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-7) for pair in zip(*gradients, strict=True))


def test_what_is_taken_apart_is_the_base(tmp_path):
    base, strategy = tiny_bert(), a_strategy("Adapter")
    before = state_of(base)
    batch = a_batch(base)
    model = strategy.prepare(loaded(base, ("classifier",)))
    learn(model, batch)
    expected, folder = answer(model, batch), delivered(strategy, model, tmp_path)
    apart = strategy.apart(model)
    assert apart.state_dict().keys() == before.keys()
    assert changed(before, state_of(apart)) == set()
    assert torch.equal(answer(strategy.together(apart, folder), batch), expected)


def test_the_loader_needs_no_more_than_torch_safetensors_and_transformers(tmp_path):
    save_tiny_llama(tmp_path / "model")
    session = a_session(a_job(tmp_path, "Adapter"), tmp_path / "scratch")
    session.trainer.train()
    folder = delivered(session.strategy, session.trainer.model, tmp_path / "adapter")
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        absent = {{"peft", "trl", "accelerate", "bitsandbytes", "datasets", "boto3", "pydantic"}}
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, *more)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
from transformers import AutoModelForCausalLM
from finetune_trainer.adapters import load_adapter
model = load_adapter(AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}), {str(folder)!r})
import torch
print(model(input_ids=torch.arange(4, 40)[None]).logits.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = answer(session.trainer.model, {"input_ids": torch.arange(4, 40)[None]}).double().sum()
    assert float(done.stdout) == pytest.approx(expected.item(), rel=1e-6)


REFUSED = {
    "ResNet": (tiny_resnet, {}, "ResNetForImageClassification (ResNetBasicLayer) have none in their feed-forward",
               "LoRA with lora.targetModules [convolution]"),
    "a mixture of experts": (
        tiny_mixtral, {}, "(MixtralDecoderLayer) have none in their feed-forward", "LoRA"),
    "a block that is not there": (tiny_llama, {"layers": {"last": 3}},
                                  "spec.strategy.adapter.layers.last is 3, but the model has only 2 blocks", "use 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_for_a_bottleneck_is_refused(case):
    build, options, words, way_out = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        a_strategy("Adapter", **options).prepare(loaded(build()))
    assert words in caught.value.message
    assert way_out in caught.value.advice


def edit(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, tensor: tensor * 0 if ".adapter.up." in name else tensor, "changes nothing"),
        (lambda name, tensor: tensor * 1.2 if "layers.1.mlp.down_proj.adapter.up" in name else tensor, "not answer"),
        (lambda name, tensor: tensor * 1.2 if "layers.1.input_layernorm" in name else tensor, "not answer"),
        (lambda name, tensor: tensor * float("nan"), "not finite"),
    ],
    ids=["untrained", "another bottleneck", "another norm", "no numbers"],
)
def test_an_adapter_that_is_not_what_was_trained_is_not_delivered(tmp_path, change, words):
    session = a_session(a_job(tmp_path, "Adapter", hyperparameters={"learningRate": 5e-2}), tmp_path / "scratch")
    session.trainer.train()
    folder = delivered(session.strategy, session.trainer.model, tmp_path / "adapter")
    edit(folder, change)
    with pytest.raises(VerificationError, match=words):
        verification.adapter(
            session.strategy, session.trainer.model, folder, {"input_ids": torch.arange(4, 44)[None]}, torch.float32
        )


@pytest.fixture
def folder(tmp_path):
    strategy = a_strategy("Adapter", size=4)
    return delivered(strategy, strategy.prepare(loaded(tiny_llama(3), ("score",))), tmp_path)


def test_a_base_of_another_shape_is_told(folder):
    with pytest.raises(ValueError, match=r"score.weight is \(3, 64\) in the adapter and \(2, 64\) .*num_labels"):
        load_adapter(tiny_llama(2), folder)


def test_a_file_that_lacks_a_tensor_is_told(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "score" not in name}, path)
    with pytest.raises(ValueError, match=r"1 tensors differ, such as score\.weight"):
        load_adapter(tiny_llama(3), folder)


def test_another_kind_of_adapter_is_told(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="holds no bottleneck adapter of version 1"):
        load_adapter(tiny_llama(3), folder)
