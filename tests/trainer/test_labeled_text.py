"""Whole runs of classifiers and regressors of texts: what they learn, how it is measured, and what is delivered."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error, r2_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from finetune_api.contract import Result
from finetune_trainer.errors import UsageError
from tests.support.jobs import a_job, a_session, letters, run, write_rows
from tests.support.models import byte_tokenizer, pair_tokenizer, save_tiny_bert, save_tiny_llama, tiny_llama_config

HELD_OUT = 18
MANY = {"a": ["a"], "b": ["a", "b"], "c": []}
KINDS = {
    "classes": {"task": "SequenceClassification"},
    "several classes": {"task": "SequenceClassification", "multiLabel": True},
    "pairs": {"task": "SequenceClassification"},
    "numbers": {"task": "Regression"},
}


def held_out(kind: str) -> list[dict[str, Any]]:
    """Rows like those of the training data, but others."""
    rows = []
    for number in range(100, 100 + HELD_OUT):
        letter = "abc"[number % 3]
        label = {"several classes": MANY[letter], "numbers": {"a": -1.5, "b": 0.5, "c": 2.5}[letter]}.get(kind, letter)
        rows.append({"text": letters(number), "label": label})
    return [as_pair(row) for row in rows] if kind == "pairs" else rows


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Whether the second text goes on as the first began."""
    return {"text": row["text"], "textPair": row["text"][:4][:: -1 if row["label"] == "a" else 1] + "bbb"} | {
        "label": "yes" if row["label"] == "b" else "no"
    }


def training_rows(kind: str) -> list[dict[str, Any]]:
    rows = [{"text": letters(number), "label": "abc"[number % 3]} for number in range(48)]
    if kind == "pairs":
        return [as_pair(row) for row in rows]
    return [row | {"label": MANY[row["label"]]} for row in rows] if kind == "several classes" else rows


@dataclass
class Outcome:
    root: Path
    kind: str
    result: Result

    @property
    def delivered(self) -> Path:
        return self.root / "out" / self.result.output.kind

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "out/report/report.json").read_text())


def a_labeled_job(root: Path, strategy: str, kind: str, **spec: Any):
    settings = dict(KINDS[kind])
    task = settings.pop("task")
    job_data = {}
    if kind != "numbers":
        job_data["uri"] = f"file://{write_rows(root / 'data' / 'rows.jsonl', training_rows(kind))}"
    job_data["validation"] = {"uri": f"file://{write_rows(root / 'data' / 'held-out.jsonl', held_out(kind))}"}
    return a_job(root, strategy, task, **{"task": settings, "dataset": job_data} | spec)


BODIES = {"bert": save_tiny_bert, "llama": save_tiny_llama}
RUNS = [
    (strategy, body, kind)
    for strategy in ("Full", "LoRA")
    for body in BODIES
    for kind in KINDS
    if kind != "pairs" or body == "bert"
] + [("QLoRA", "bert", "classes"), ("QLoRA", "llama", "numbers"), ("LayerNorm", "bert", "classes")]
EXACT = [each for each in RUNS if each[0] != "QLoRA"]
"""A 4-bit base answers a little otherwise than the one that the card loads."""


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory, cache={}) -> Outcome:  # noqa: B006
    strategy, body, kind = request.param
    if request.param not in cache:
        root = tmp_path_factory.mktemp("-".join(request.param).replace(" ", "-"))
        BODIES[body](root / "model")
        job = a_labeled_job(root, strategy, kind, output={"merge": strategy in ("LoRA", "QLoRA")})
        cache[request.param] = Outcome(root, kind, run(job, root / "scratch"))
    return cache[request.param]


def of(runs):
    return pytest.mark.parametrize("outcome", runs, indirect=True, ids="-".join)


def as_the_card_says(outcome: Outcome) -> torch.nn.Module:
    """The model as the code in the delivered README.md loads it."""
    code = re.search(r"```python\n(.*?)```", (outcome.delivered / "README.md").read_text(), re.S)[1]
    code = code.replace("<this folder>", str(outcome.delivered)).replace("<base model>", str(outcome.root / "model"))
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"].eval()


def predictions(outcome: Outcome, model: torch.nn.Module | None = None) -> torch.Tensor:
    """Logits for the held-out rows in plain transformers: (rows, outputs)."""
    model = as_the_card_says(outcome) if model is None else model.eval()
    tokenizer = AutoTokenizer.from_pretrained(outcome.delivered)
    rows = held_out(outcome.kind)
    pairs = [row["textPair"] for row in rows] if outcome.kind == "pairs" else None
    encoded = tokenizer([row["text"] for row in rows], pairs, padding=True, return_tensors="pt")
    # The general class of tokenizers gives types to models that know none.
    known = {"input_ids", "attention_mask", *(["token_type_ids"] if pairs else [])}
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in encoded.items() if name in known}).logits


@of(RUNS)
def test_more_is_learned_than_the_plainest_guess_knows(outcome):
    assert outcome.result.metrics["eval_loss"] < 0.8 * outcome.result.baseline["eval_loss"]
    assert (
        outcome.report["baseline"]
        == {
            "classes": "majority class",
            "pairs": "majority class",
            "several classes": "majority of each class",
            "numbers": "mean",
        }[outcome.kind]
    )


@of([each for each in EXACT if each[2] in ("classes", "pairs")])
def test_metrics_are_those_of_scikit_learn_for_what_is_delivered(outcome):
    logits, metrics = predictions(outcome), outcome.result.metrics
    labels = [row["label"] for row in held_out(outcome.kind)]
    names = sorted(set(labels))
    predicted = [names[number] for number in logits.argmax(-1)]
    assert metrics["eval_accuracy"] == accuracy_score(labels, predicted)
    assert metrics["eval_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["eval_loss"] == pytest.approx(log_loss(labels, logits.double().softmax(-1)), rel=1e-3)


@of([each for each in RUNS if each[2] == "several classes"])
def test_metrics_of_several_classes_are_those_of_scikit_learn(outcome):
    logits, metrics = predictions(outcome), outcome.result.metrics
    labels = np.array([[name in row["label"] for name in "ab"] for row in held_out(outcome.kind)])
    assert metrics["eval_accuracy"] == accuracy_score(labels, logits > 0)
    assert metrics["eval_f1"] == pytest.approx(f1_score(labels, logits > 0, average="macro", zero_division=0))


@of([each for each in EXACT if each[2] == "numbers"])
def test_metrics_of_numbers_are_those_of_scikit_learn(outcome):
    predicted, metrics = predictions(outcome).squeeze(-1), outcome.result.metrics
    labels = [row["label"] for row in held_out(outcome.kind)]
    assert metrics["eval_r2"] == pytest.approx(r2_score(labels, predicted), abs=1e-3)
    assert metrics["eval_mae"] == pytest.approx(mean_absolute_error(labels, predicted), abs=1e-3)
    assert metrics["eval_mse"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert len(outcome.report["evaluation"]["points"]) == HELD_OUT


@of([each for each in RUNS if each[0] == "LoRA"])
def test_the_merged_model_answers_as_the_adapter_on_its_base(outcome):
    merged = AutoModelForSequenceClassification.from_pretrained(outcome.root / "out/model")
    assert torch.allclose(predictions(outcome, merged), predictions(outcome), atol=1e-4)


@of([each for each in RUNS if each[0] == "Full"])
def test_a_delivered_model_knows_its_classes_and_what_it_was_asked(outcome):
    config = AutoModelForSequenceClassification.from_pretrained(outcome.delivered).config
    labels = {"classes": ["a", "b", "c"], "several classes": ["a", "b"], "pairs": ["no", "yes"]}
    assert list(config.id2label.values()) == labels.get(outcome.kind, ["LABEL_0"])
    assert config.label2id == {label: number for number, label in config.id2label.items()}
    problem = {"several classes": "multi_label_classification", "numbers": "regression"}
    assert config.problem_type == problem.get(outcome.kind, "single_label_classification")
    card = (outcome.delivered / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert ("`" + "`, `".join(labels[outcome.kind]) + "`" if outcome.kind in labels else "It gives a number") in card


@of([each for each in RUNS if each[0] == "LoRA" and each[2] == "classes"])
def test_an_adapter_holds_the_new_head_whole(outcome):
    names = load_file(outcome.delivered / "adapter_model.safetensors")
    assert {name for name in names if "lora" not in name} in (
        {"base_model.model.score.weight"},
        {"base_model.model.classifier.weight", "base_model.model.classifier.bias"},
    )


@of([("Full", "bert", "classes"), ("Full", "bert", "several classes"), ("Full", "llama", "numbers")])
def test_the_page_shows_what_was_answered(outcome):
    page = (outcome.root / "out/report/index.html").read_text()
    assert {"classes": "Which class is taken for which", "numbers": "<circle"}.get(outcome.kind, "<h2>Classes") in page
    assert {"classes": "<th>Majority class", "numbers": "<th>Mean"}.get(outcome.kind, "<th>Majority of each") in page


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(max((root / "out/checkpoints").iterdir()) / "trainable.safetensors")


def test_a_head_for_the_same_classes_is_kept_and_measured_as_it_was(tmp_path):
    names = {"id2label": {0: "c", 1: "b", 2: "a"}}
    save_tiny_bert(tmp_path / "model", BertForSequenceClassification, **names)
    session = a_session(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(session.trainer.model.classifier.weight, base.classifier.weight)
    assert session.task.baseline() is None
    assert session.trainer.model.config.id2label == names["id2label"]


@pytest.mark.parametrize("names", [["a", "b", "d"], ["LABEL_0", "LABEL_1", "LABEL_2"]], ids=str)
def test_a_head_for_other_classes_is_drawn_anew_though_it_has_as_many(tmp_path, names):
    save_tiny_bert(tmp_path / "model", BertForSequenceClassification, id2label=dict(enumerate(names)))
    session = a_session(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    model = session.trainer.model
    assert session.task.fresh == ("classifier",)
    assert not torch.equal(model.classifier.weight, base.classifier.weight)
    assert torch.equal(model.bert.pooler.dense.weight, base.bert.pooler.dense.weight)
    assert session.task.baseline().what == "majority class"


def test_a_model_of_masked_words_gets_a_pooler_and_a_head(tmp_path):
    save_tiny_bert(tmp_path / "model", BertForMaskedLM)
    result = run(a_labeled_job(tmp_path, "LoRA", "classes"), tmp_path / "scratch")
    assert result.metrics["eval_accuracy"] > result.baseline["eval_accuracy"]
    names = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert "base_model.model.bert.pooler.dense.weight" in names
    assert not any("pooler" in name and "lora" in name for name in names)


def test_a_head_is_drawn_alike_in_every_attempt(tmp_path):
    save_tiny_bert(tmp_path / "model")
    one, two = (a_session(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / name) for name in "ab")
    assert torch.equal(one.trainer.model.classifier.weight, two.trainer.model.classifier.weight)


def test_a_llama_classifier_for_the_same_classes_is_kept(tmp_path):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama_config(id2label={0: "a", 1: "b", 2: "c"}))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    session = a_session(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
    assert torch.equal(session.trainer.model.score.weight, model.score.weight)


def test_two_classes_have_two_outputs(tmp_path):
    save_tiny_llama(tmp_path / "model")
    rows = [row for row in training_rows("classes") if row["label"] != "c"]
    data = {"uri": f"file://{write_rows(tmp_path / 'two.jsonl', rows)}", "validation": {"fraction": 0.2}}
    result = run(a_labeled_job(tmp_path, "Full", "classes", dataset=data), tmp_path / "scratch")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model").config.num_labels == 2
    assert result.metrics["eval_accuracy"] == 1.0


def test_a_tokenizer_without_padding_pads_with_its_end_token_and_the_model_knows(tmp_path):
    save_tiny_llama(tmp_path / "model", pad_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    result = run(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
    assert result.metrics["eval_accuracy"] > 0.8
    delivered = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model")
    assert delivered.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "out/model").pad_token_id == 3


@pytest.mark.parametrize("body", BODIES)
def test_padding_changes_no_answer(tmp_path, body):
    BODIES[body](tmp_path / "model")
    session = a_session(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
    rows, model = list(session.prepared.train)[:6], session.trainer.model.eval()
    with torch.no_grad():
        together = model(**without_labels(session.task.collator(rows))).logits
        alone = torch.cat([model(**without_labels(session.task.collator([row]))).logits for row in rows])
    assert len({len(row["input_ids"]) for row in rows}) > 1
    assert torch.allclose(together, alone, atol=1e-5)


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def test_gpt2_answers_at_the_last_token_and_keeps_its_padding_on_the_right(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=3, bos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    result = run(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out/model").padding_side == "right"


def test_accumulation_takes_the_steps_of_one_large_batch(tmp_path):
    save_tiny_bert(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name, values in (("whole", (8, 1)), ("parts", (2, 4))):
        steps = {"perDeviceBatchSize": values[0], "gradientAccumulationSteps": values[1], "maxSteps": 3}
        # Without momentum and scaling a wrong factor shows.
        settings = {"hyperparameters": steps | {"optimizer": "sgd", "maxGradNorm": 0}}
        job = a_labeled_job(tmp_path, "Full", "classes", output={"uri": f"file://{tmp_path}/{name}/out"}, **settings)
        run(job, tmp_path / name / "scratch")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_label_smoothing_is_part_of_training_and_not_of_evaluation(tmp_path):
    save_tiny_bert(tmp_path / "model")
    job = a_labeled_job(tmp_path, "Full", "classes", hyperparameters={"labelSmoothing": 0.5})
    session = a_session(job, tmp_path / "scratch")
    trainer = session.trainer
    batch = session.task.collator(list(session.prepared.train)[:4])
    trainer.model.eval()
    logits = trainer.model(**without_labels(batch)).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.5)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item())
    plain = a_session(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "plain").trainer
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_only_the_metrics_that_are_asked_for_are_measured(tmp_path):
    save_tiny_bert(tmp_path / "model")
    job = a_labeled_job(tmp_path, "Full", "classes", evaluation={"metrics": ["f1"]}, hyperparameters={"maxSteps": 2})
    result = run(job, tmp_path / "scratch")
    assert result.metrics.keys() == result.baseline.keys() == {"eval_loss", "eval_f1"}


@pytest.mark.parametrize(("limit", "said"), [(None, "the model's 62 tokens"), (20, "hyperparameters.maxLength 20")])
def test_rows_are_cut_to_what_the_model_takes(tmp_path, limit, said):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=272, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "model")
    tokenizer = pair_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "x" * 100, "label": number % 2} for number in range(8)]
    data = {"uri": f"file://{write_rows(tmp_path / 'long.jsonl', rows)}", "validation": {"fraction": 0.5}}
    values = {"maxLength": limit, "maxSteps": 1}
    run(a_labeled_job(tmp_path, "Full", "classes", dataset=data, hyperparameters=values), tmp_path / "scratch")
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    assert report["data"]["maxLength"].startswith(said)
    assert f"8 of 8 rows were cut to {said}" in report["warnings"][0]


def test_a_model_on_which_there_is_no_head_is_refused(tmp_path):
    save_tiny_llama(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba", "architectures": ["Mamba"]}))
    with pytest.raises(UsageError, match="is Mamba, on which there is no head for task Regression") as refusal:
        run(a_labeled_job(tmp_path, "Full", "numbers"), tmp_path / "scratch")
    assert "BERT" in refusal.value.advice


def test_a_body_that_lacks_a_layer_is_refused(tmp_path):
    from safetensors.torch import save_file

    file = save_tiny_bert(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensors[name] for name in tensors if "layer.1.output.dense" not in name}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 2 tensors .* such as bert.encoder.layer.1.output.dense.bias"):
        run(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    save_tiny_llama(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="has no token to pad rows with"):
        run(a_labeled_job(tmp_path, "Full", "classes"), tmp_path / "scratch")
