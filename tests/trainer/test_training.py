"""Whole runs of tiny models, from the spec to the bucket, for every strategy with every task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.contract import Result
from tests.support.jobs import a_job, run, to_bucket
from tests.support.models import save_tiny_llama

PAIRS = [(strategy, task) for strategy in ("Full", "LoRA", "QLoRA") for task in ("Instruction", "CausalLM")]
ADAPTED = [pair for pair in PAIRS if pair[0] != "Full"]


@dataclass
class Outcome:
    root: Path
    result: Result

    @property
    def delivered(self) -> Path:
        return self.root / "out" / self.result.output.kind

    @property
    def base(self) -> Path:
        return self.root / "model"

    @property
    def last_checkpoint(self) -> Path:
        return max((self.root / "out/checkpoints").iterdir())


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory, cache={}) -> Outcome:  # noqa: B006
    strategy, task = request.param
    if request.param not in cache:
        root = tmp_path_factory.mktemp(f"{strategy}-{task}")
        job = a_job(root, strategy, task, output={"merge": strategy != "Full"})
        cache[request.param] = Outcome(root, run(job, root / "scratch"))
    return cache[request.param]


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 68)[None]).logits


every_pair = pytest.mark.parametrize("outcome", PAIRS, indirect=True, ids="-".join)
every_adapter = pytest.mark.parametrize("outcome", ADAPTED, indirect=True, ids="-".join)


@every_pair
def test_the_loss_on_held_out_rows_falls(outcome):
    assert outcome.result.metrics["eval_loss"] < outcome.result.baseline["eval_loss"] - 0.2
    assert outcome.result.metrics["eval_perplexity"] < outcome.result.baseline["eval_perplexity"]


@every_pair
def test_the_result_says_what_was_done(outcome):
    result = json.loads((outcome.root / "out/result.json").read_text())
    assert (result["uid"], result["steps"], result["checkpoint"]["step"]) == ("uid-1", 6, 6)
    log = json.loads((outcome.last_checkpoint / "trainer_state.json").read_text())["log_history"]
    assert result["loss"] == [entry["loss"] for entry in log if "loss" in entry][-1]
    assert result["tokens"] > 500
    assert 0 < result["trainSeconds"] < 100
    assert result["samples"][0].keys() == {"prompt", "reference", "before", "after"}
    assert "trl" in result["versions"]


@every_pair
def test_what_is_delivered_holds_exactly_the_weights_of_the_last_step(outcome):
    trained = load_file(outcome.last_checkpoint / "trainable.safetensors")
    (weights,) = outcome.delivered.glob("*.safetensors")
    delivered = load_file(weights)
    names = {name.replace(".default.", "."): name for name in trained}
    assert delivered.keys() == names.keys()
    assert all(torch.equal(delivered[name], trained[names[name]]) for name in delivered)


@every_pair
def test_tokenizer_template_and_end_tokens_come_with_it(outcome):
    tokenizer = AutoTokenizer.from_pretrained(outcome.delivered)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("Hi<|im_end|>\n")
    assert json.loads((outcome.delivered / "generation_config.json").read_text())["eos_token_id"] == [3]


@every_pair
def test_the_model_card_names_base_data_and_metrics(outcome):
    card = (outcome.delivered / "README.md").read_text()
    assert f"base_model: file://{outcome.base}" in card
    assert ".jsonl" in card
    assert "eval_perplexity" in card


@every_pair
def test_the_report_has_the_curve_of_every_step(outcome):
    report = json.loads((outcome.root / "out/report/report.json").read_text())
    assert [entry["step"] for entry in report["history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert report["data"]["rows"]
    assert "<polyline" in (outcome.root / "out/report/index.html").read_text()


@every_adapter
def test_the_adapter_loads_in_plain_peft_and_changes_the_answers(outcome):
    base = AutoModelForCausalLM.from_pretrained(outcome.base)
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, str(outcome.delivered))
    assert adapted.peft_config["default"].base_model_name_or_path == f"file://{outcome.base}"
    assert not torch.allclose(before, logits(adapted), atol=1e-3)


@every_adapter
def test_the_merged_model_answers_as_base_and_adapter_do_together(outcome):
    base = AutoModelForCausalLM.from_pretrained(outcome.base)
    adapted = PeftModel.from_pretrained(base, str(outcome.delivered))
    merged = AutoModelForCausalLM.from_pretrained(outcome.root / "out/model")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)
    assert "library_name: transformers" in (outcome.root / "out/model/README.md").read_text()


def test_a_bfloat16_base_is_delivered_in_bfloat16(tmp_path):
    save_tiny_llama(tmp_path / "model", torch.bfloat16)
    run(a_job(tmp_path, "Full"), tmp_path / "scratch")
    delivered = load_file(tmp_path / "out/model/model.safetensors")
    assert {tensor.dtype for tensor in delivered.values()} == {torch.bfloat16}


def test_an_output_head_that_shares_the_embedding_is_trained_and_merged(tmp_path):
    save_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    run(a_job(tmp_path, lora={"modulesToSave": ["lm_head"]}, output={"merge": True}), tmp_path / "scratch")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"rsLoRA": True}, {"doRA": True}, {"targetModules": ["q_proj", "v_proj"]}], ids=str
)
def test_the_variants_of_lora_are_delivered(tmp_path, options):
    result = run(a_job(tmp_path, lora=options, output={"merge": True}), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"]


def test_without_held_out_rows_nothing_is_measured(tmp_path):
    result = run(a_job(tmp_path, dataset={"validation": None}), tmp_path / "scratch")
    assert (result.metrics, result.baseline, result.samples) == ({}, {}, [])


def test_a_run_from_bucket_to_bucket(tmp_path, s3_server, bucket, monkeypatch):
    for name, value in s3_server.environ().items():
        monkeypatch.setenv(name, value)
    client = s3_server.client()
    job = to_bucket(a_job(tmp_path), client, bucket)
    client.put_object(Bucket=bucket, Key="in/pytorch_model.bin", Body=b"never read")
    result = run(job, tmp_path / "scratch")
    assert result.output.uri == f"s3://{bucket}/out/adapter"
    assert not (tmp_path / "scratch/model/pytorch_model.bin").exists()
    keys = {item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]}
    assert {"out/adapter/adapter_model.safetensors", "out/report/index.html", "out/result.json"} <= keys
