"""What is delivered is read back and doubted."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from finetune_trainer import verification
from finetune_trainer.strategies.base import save_model
from finetune_trainer.verification import VerificationError
from tests.support.architectures import tiny_llama
from tests.support.jobs import a_job, a_session, run

PROBE = {"input_ids": torch.arange(4, 44)[None]}


@pytest.fixture
def trained(tmp_path):
    """A trained session and the folder of its adapter."""
    session = a_session(a_job(tmp_path), tmp_path / "scratch")
    session.trainer.train()
    folder = tmp_path / "adapter"
    session.strategy.export(session.trainer.model, folder, "file:///base", torch.float32)
    return session, folder


def edit(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def verify(trained) -> None:
    session, folder = trained
    verification.adapter(session.strategy, session.trainer.model, folder, PROBE, torch.float32)


def test_the_adapter_that_was_trained_passes(trained):
    verify(trained)


def test_an_adapter_without_an_update_is_not_delivered(trained):
    edit(trained[1], lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    with pytest.raises(VerificationError, match="changes nothing"):
        verify(trained)


def test_an_adapter_without_tensors_is_not_delivered(trained):
    save_file({}, trained[1] / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="holds no tensors"):
        verify(trained)


def test_an_adapter_with_a_number_that_is_none_is_not_delivered(trained):
    edit(trained[1], lambda name, tensor: tensor * float("nan") if "layers.1" in name else tensor)
    with pytest.raises(VerificationError, match="not finite"):
        verify(trained)


def test_an_adapter_with_other_weights_is_not_delivered(trained):
    edit(trained[1], lambda name, tensor: tensor * 1.2 if "layers.1.mlp.down_proj.lora_B" in name else tensor)
    with pytest.raises(VerificationError, match="does not answer as the trained model"):
        verify(trained)


def test_a_model_that_is_the_base_is_not_delivered(tmp_path):
    with pytest.raises(VerificationError, match="bit by bit the base"):
        run(a_job(tmp_path, "Full", hyperparameters={"learningRate": 1e-30}), tmp_path / "scratch")
    assert not (tmp_path / "out/result.json").exists()


def test_one_changed_tensor_makes_another_model(tmp_path):
    a_job(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    path = tmp_path / "other/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, path)
    verification.differs_from(tmp_path / "model", tmp_path / "other")


def test_answers_that_are_no_numbers_are_not_the_same():
    answer = torch.ones(1, 2, 3)
    with pytest.raises(VerificationError):
        verification.same(answer, answer * float("nan"), torch.float32, "s3://b/x")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_model_saved_in_few_bits_answers_as_the_one_that_loads_from_the_file(tmp_path, stored):
    model = tiny_llama()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    save_model(model, tmp_path, stored)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=stored)
    assert {parameter.dtype for parameter in again.parameters()} == {stored}
    assert torch.equal(verification.logits(model, PROBE), verification.logits(again, PROBE))
