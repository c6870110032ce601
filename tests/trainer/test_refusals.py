"""What cannot work is refused before anything is trained, with the field's name and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, MambaConfig

from finetune_api.hyperparameters import Hyperparameters
from finetune_api.job import Attention, Dtype
from finetune_trainer.arguments import refuse_what_cannot_work
from finetune_trainer.errors import DataError, UsageError
from finetune_trainer.hardware import Hardware, attention_implementation, compute_dtype
from finetune_trainer.model import override_dropout
from tests.support.jobs import a_context, a_job, run
from tests.support.models import byte_tokenizer, save_tiny_llama

GPU = Hardware(cuda=True, bfloat16=True, flash_attention=False)
OLD_GPU = Hardware(cuda=True, bfloat16=False, flash_attention=True)
CPU = Hardware(cuda=False, bfloat16=False, flash_attention=False)


def refusal(tmp_path: Path, *args: Any, kind: type = UsageError, **spec: Any) -> str:
    """What a run of the job is refused with; nothing may have been written by then."""
    with pytest.raises(kind) as caught:
        run(a_job(tmp_path, *args, **spec), tmp_path / "scratch")
    assert not (tmp_path / "out").exists()
    assert caught.value.advice
    return f"{caught.value.message} | {caught.value.advice}"


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_that_is_not_there(tmp_path):
    assert "spec.model.uri" in refusal(tmp_path, model={"uri": f"file://{tmp_path}/nowhere"})


def test_a_folder_without_config(tmp_path, model):
    (model / "config.json").unlink()
    assert "has no config.json (found: chat_template.jinja, " in refusal(tmp_path)


def test_a_folder_without_weights(tmp_path, model):
    (model / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(tmp_path)


def test_a_folder_whose_weights_are_pickles(tmp_path, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    text = refusal(tmp_path)
    assert "only as pickles (pytorch_model.bin)" in text
    assert "save_pretrained" in text


def test_a_folder_without_tokenizer(tmp_path, model):
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(tmp_path)


def test_a_tokenizer_that_is_broken(tmp_path, model):
    (model / "tokenizer.json").write_text('{"model": ')
    assert "the tokenizer of" in refusal(tmp_path)


def test_a_tokenizer_that_belongs_to_another_model(tmp_path, model):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(20)])
    tokenizer.save_pretrained(model)
    assert "has 280 tokens, the model embeds only 272" in refusal(tmp_path)


def test_a_shard_that_is_cut_off(tmp_path, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot be loaded" in refusal(tmp_path)


def test_a_tensor_that_is_missing(tmp_path, model):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors that the architecture needs, such as model.layers.1.mlp.up_proj.weight" in refusal(tmp_path)


def test_a_model_that_does_not_generate_text(tmp_path, model):
    BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(model)
    assert "is BertForSequenceClassification, not a causal language model" in refusal(tmp_path)


def test_a_model_that_only_encodes_and_decodes(tmp_path, model):
    edit_config(model, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "is T5ForConditionalGeneration, not a causal language model" in refusal(tmp_path)


def test_a_model_that_brings_its_own_code(tmp_path, model):
    edit_config(model, model_type="unheard_of", auto_map={"AutoModelForCausalLM": "code.Model"})
    text = refusal(tmp_path)
    assert "spec.model.trustRemoteCode" in text
    assert "if you trust it" in text


def test_a_model_that_nobody_knows(tmp_path, model):
    edit_config(model, model_type="unheard_of")
    assert "does not know the model type 'unheard_of'" in refusal(tmp_path)


def test_rows_longer_than_the_model_has_positions(tmp_path):
    text = refusal(tmp_path, hyperparameters={"maxLength": 513})
    assert "maxLength is 513, but the model has only 512 positions" in text


def test_targets_without_a_match(tmp_path):
    text = refusal(tmp_path, lora={"targetModules": ["q_proj", "query"]})
    assert "no module of the model is called query" in text
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in text


def test_a_target_that_is_no_linear_layer(tmp_path):
    assert "input_layernorm is a LlamaRMSNorm" in refusal(tmp_path, lora={"targetModules": ["input_layernorm"]})


def test_the_output_head_as_a_target(tmp_path):
    assert "modulesToSave to train it whole" in refusal(tmp_path, lora={"targetModules": ["lm_head"]})


def test_modules_to_save_without_a_match(tmp_path):
    text = refusal(tmp_path, lora={"modulesToSave": ["head"]})
    assert "no module of the model is called head" in text
    assert "lm_head" in text


def test_dropout_on_an_architecture_without(tmp_path, model):
    edit_config(model, model_type="gpt_bigcode")

    with pytest.raises(UsageError, match="the architecture mamba has no dropout"):
        override_dropout(MambaConfig(), 0.1)


def test_half_precision_on_a_cpu(tmp_path):
    assert "float16 needs a GPU" in refusal(tmp_path, model={"dtype": "float16"})


def test_flash_attention_on_a_cpu(tmp_path):
    assert "flash_attention_2 needs a GPU" in refusal(tmp_path, model={"attention": "flash_attention_2"})


def test_a_paged_optimizer_on_a_cpu(tmp_path):
    assert "adamw8bit" in refusal(tmp_path, hyperparameters={"optimizer": "pagedAdamw8bit"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(tmp_path):
    assert "sees no GPU" in refusal(tmp_path, resources={"gpusPerNode": 1})


def test_what_a_gpu_lacks_is_told_too():
    with pytest.raises(UsageError, match="package flash-attn"):
        attention_implementation(Attention.FLASH_ATTENTION_2, GPU, torch.bfloat16)
    with pytest.raises(UsageError, match="bfloat16 or float16 only"):
        attention_implementation(Attention.FLASH_ATTENTION_2, OLD_GPU, torch.float32)
    with pytest.raises(UsageError, match="does not compute in bfloat16"):
        compute_dtype(Dtype.BFLOAT16, OLD_GPU)


def test_auto_takes_the_best_that_is_there():
    assert compute_dtype(Dtype.AUTO, GPU) is torch.bfloat16
    assert compute_dtype(Dtype.AUTO, OLD_GPU) is torch.float32
    assert compute_dtype(Dtype.AUTO, CPU) is torch.float32
    assert attention_implementation(Attention.AUTO, GPU, torch.bfloat16) == "sdpa"
    assert attention_implementation(Attention.AUTO, OLD_GPU, torch.float16) == "flash_attention_2"
    assert attention_implementation(Attention.AUTO, OLD_GPU, torch.float32) == "sdpa"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "sgd", "beta1": 0.8}, "beta1 has no meaning for the optimizer sgd"),
        ({"optimizer": "adafactor", "epsilon": 1e-6}, "epsilon has no meaning for the optimizer adafactor"),
        ({"scheduler": "constant", "warmupSteps": 3, "warmupRatio": 0}, "the scheduler constant has no warm-up"),
    ],
    ids=str,
)
def test_settings_that_would_be_ignored(values, words):
    with pytest.raises(UsageError, match=words):
        refuse_what_cannot_work(Hyperparameters.from_wire(values), CPU)


def test_a_dataset_that_is_not_there(tmp_path):
    text = refusal(tmp_path, kind=DataError, dataset={"uri": f"file://{tmp_path}/none/*.jsonl"})
    assert "spec.dataset.uri" in text


def test_held_out_rows_that_are_not_there(tmp_path):
    validation = {"uri": f"file://{tmp_path}/none.jsonl"}
    assert "spec.dataset.validation.uri" in refusal(tmp_path, kind=DataError, dataset={"validation": validation})


def test_the_result_of_another_job_is_not_overwritten(tmp_path):
    run(a_job(tmp_path), tmp_path / "scratch")
    other = a_job(tmp_path)
    other.metadata.uid, other.metadata.name = "uid-2", "other"
    with pytest.raises(UsageError, match=r"spec.output.uri: .* the result of another job \(tiny, uid uid-1\)"):
        run(other, tmp_path / "scratch-2")


def test_the_checkpoints_of_another_job_are_not_overwritten(tmp_path):
    run(a_job(tmp_path), tmp_path / "scratch")
    (tmp_path / "out/result.json").unlink()
    other = a_job(tmp_path)
    other.metadata.uid = "uid-2"
    with pytest.raises(UsageError, match="holds checkpoints of another job"):
        run(other, tmp_path / "scratch-2")


def test_a_finished_job_is_not_run_again(tmp_path):
    first = run(a_job(tmp_path), tmp_path / "scratch")
    (tmp_path / "model/config.json").unlink()
    context = a_context(a_job(tmp_path), tmp_path / "again", attempt=2)
    assert run(context.job, tmp_path / "again", context=context) == first
