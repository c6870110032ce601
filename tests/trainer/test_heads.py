"""Heads are found by structure, whatever an architecture calls them, and what is measured of their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.metrics import classification_report, confusion_matrix, f1_score, log_loss, r2_score
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    ResNetConfig,
    RobertaConfig,
    TimmWrapperConfig,
    ViTConfig,
    XLNetConfig,
)

from finetune_api.job import ModelSpec
from finetune_trainer.evaluation.predictions import PredictionMeter
from finetune_trainer.evaluation.targets import AnyClasses, Number, OneClass
from finetune_trainer.heads import Head, draw_again
from finetune_trainer.model import Source, load_weights

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT, IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
HEADS = [
    (TEXT, BertConfig(**TINY), ("classifier",), ("bert.pooler", "classifier")),
    (TEXT, RobertaConfig(**TINY), ("classifier",), ("classifier",)),
    (TEXT, DistilBertConfig(dim=32, n_layers=2, n_heads=2), ("classifier",), ("pre_classifier", "classifier")),
    (TEXT, DebertaV2Config(**TINY), ("classifier",), ("pooler", "classifier")),
    (TEXT, ModernBertConfig(**TINY), ("classifier",), ("head", "classifier")),
    (TEXT, XLNetConfig(d_model=32, n_layer=2, n_head=2), ("logits_proj",), ("sequence_summary", "logits_proj")),
    (TEXT, BartConfig(d_model=32), ("classification_head",), ("classification_head",)),
    (TEXT, LlamaConfig(**TINY), ("score",), ("score",)),
    (TEXT, GPT2Config(n_embd=32, n_layer=2, n_head=2), ("score",), ("score",)),
    (IMAGE, ViTConfig(**TINY), ("classifier",), ("classifier",)),
    (IMAGE, ResNetConfig(), ("classifier",), ("classifier",)),
    (IMAGE, TimmWrapperConfig(architecture="vgg11", num_labels=2), ("timm_model.head.fc",), ("timm_model.head.fc",)),
]


def source(config: PretrainedConfig, folder: Path = Path()) -> Source:
    return Source(folder, ModelSpec(uri=f"file://{folder}"), config, torch.float32, "sdpa")


@pytest.mark.parametrize(
    ("loader", "config", "outputs", "modules"), HEADS, ids=[type(case[1]).__name__ for case in HEADS]
)
def test_the_head_is_what_depends_on_the_number_of_answers_and_what_a_body_lacks(loader, config, outputs, modules):
    head = Head(source(config), loader)
    assert (head.outputs, head.modules) == (outputs, modules)


@pytest.mark.parametrize(
    ("base", "lacking"),
    [
        (BertModel, ("classifier",)),
        (BertForMaskedLM, ("bert.pooler", "classifier")),
        (BertForSequenceClassification, ()),
    ],
)
def test_what_a_folder_lacks_of_the_head_is_told_from_what_it_lacks_of_the_body(tmp_path, base, lacking):
    config = BertConfig(**TINY)
    base(config).save_pretrained(tmp_path)
    found = load_weights(source(config, tmp_path), TEXT)
    assert Head(source(config), TEXT).lacking(found.missing) == (lacking, [])
    assert Head(source(config), TEXT).lacking(["bert.encoder.layer.0.output.dense.weight"]) == (
        (),
        ["bert.encoder.layer.0.output.dense.weight"],
    )


def test_drawing_again_changes_the_named_modules_and_nothing_else(tmp_path):
    config = RobertaConfig(**TINY)
    model = load_weights(source(config, save(config, tmp_path)), TEXT).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw_again(model, ["classifier"])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.dense.weight", "classifier.out_proj.weight"}
    assert model.classifier.dense.weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)


def save(config: PretrainedConfig, folder: Path) -> Path:
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def test_a_head_is_kept_when_names_order_and_question_are_the_same():
    def config(labels, problem=None):
        return BertConfig(id2label=dict(enumerate(labels)), problem_type=problem)

    assert OneClass(["no", "yes"]).fits(config(["no", "yes"]))
    assert not OneClass(["no", "yes"]).fits(config(["yes", "no"]))
    assert not OneClass(["no", "yes"]).fits(config(["LABEL_0", "LABEL_1"]))
    assert not OneClass(["no", "yes"]).fits(config(["no", "yes"], "multi_label_classification"))
    assert AnyClasses(["no", "yes"]).fits(config(["no", "yes"], "multi_label_classification"))
    many = [f"class {number}" for number in range(12)]
    assert OneClass(many).fits(BertConfig(id2label={number: many[number] for number in [0, 1, 10, 11, *range(2, 10)]}))
    assert Number().fits(config(["quality"]))
    assert not Number().fits(config(["no", "yes"]))


GENERATOR = np.random.default_rng(0)
CLASSES = ["a", "b", "c"]


def measured(target, logits, labels):
    names = ["mse", "mae", "r2"] if isinstance(target, Number) else ["accuracy", "precision", "recall", "f1"]
    meter = PredictionMeter(target, names)
    for rows in torch.arange(len(labels)).split(7):
        meter.take(logits[rows], labels[rows])
    return meter.metrics(), meter.details()


def test_one_class_is_measured_as_scikit_learn_does():
    logits = torch.tensor(GENERATOR.normal(size=(40, 3)), dtype=torch.float32)
    labels = torch.tensor(GENERATOR.integers(0, 3, 40))
    metrics, details = measured(OneClass(CLASSES), logits, labels)
    predicted = logits.argmax(-1)
    expected = classification_report(labels, predicted, output_dict=True, target_names=CLASSES)
    for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert metrics[name] == pytest.approx(expected["macro avg"][key])
        assert [row[name] for row in details["classes"]] == pytest.approx([expected[label][key] for label in CLASSES])
    assert metrics["accuracy"] == pytest.approx(expected["accuracy"])
    assert metrics["loss"] == pytest.approx(log_loss(labels, logits.double().softmax(-1)), rel=1e-5)
    assert details["confusion"]["counts"] == confusion_matrix(labels, predicted).tolist()


def test_several_classes_are_measured_as_scikit_learn_does():
    logits = torch.tensor(GENERATOR.normal(size=(40, 3)), dtype=torch.float32)
    labels = AnyClasses(CLASSES).tensor([[0], [], [1, 2], [0, 1, 2]] * 10)
    metrics, details = measured(AnyClasses(CLASSES), logits, labels)
    predicted = (logits.sigmoid() > 0.5).int()
    assert metrics["accuracy"] == pytest.approx((predicted == labels).all(-1).float().mean().item())
    assert metrics["f1"] == pytest.approx(f1_score(labels.int(), predicted, average="macro"))
    assert [row["rows"] for row in details["classes"]] == [20, 20, 20]
    each = [log_loss(labels[:, i], logits[:, i].double().sigmoid()) for i in range(3)]
    assert metrics["loss"] == pytest.approx(np.mean(each), rel=1e-5)


def test_numbers_are_measured_as_scikit_learn_does():
    labels = torch.tensor(GENERATOR.normal(size=1200), dtype=torch.float32)
    logits = labels[:, None] + 0.5
    metrics, details = measured(Number(), logits, labels)
    assert metrics == pytest.approx({"loss": 0.25, "mse": 0.25, "mae": 0.5, "r2": r2_score(labels, logits)}, rel=1e-5)
    assert len(details["points"]) == 400


def test_the_plainest_guess_is_that_of_scikit_learn():
    train, held_out = torch.tensor([0] * 5 + [1] * 3 + [2]), torch.tensor([0, 1, 2, 2])
    guess = DummyClassifier(strategy="prior").fit(np.zeros((9, 1)), train)
    target = OneClass(CLASSES)
    metrics, _ = measured(target, target.constant(train).expand(4, -1), held_out)
    assert metrics["loss"] == pytest.approx(log_loss(held_out, guess.predict_proba(np.zeros((4, 1)))))
    assert metrics["accuracy"] == pytest.approx(guess.score(np.zeros((4, 1)), held_out))


def test_a_guess_has_a_finite_loss_for_classes_that_were_never_seen():
    target = OneClass(CLASSES)
    metrics, _ = measured(target, target.constant(torch.tensor([0, 0, 1])).expand(2, -1), torch.tensor([2, 2]))
    assert metrics["loss"] == pytest.approx(-np.log(0.5 / 3.5))
    many = AnyClasses(CLASSES)
    odds = many.constant(many.tensor([[0], [0, 1]]))
    assert odds.tolist() == pytest.approx([np.log(3), 0.0, -np.log(3)])
    assert Number().constant(torch.tensor([1.0, 4.0])).tolist() == [2.5]


def test_tables_of_very_many_classes_stay_readable():
    target = OneClass([str(number) for number in range(300)])
    labels = torch.arange(300)
    _, details = measured(target, torch.nn.functional.one_hot(labels.roll(1), 300).float(), labels)
    assert len(details["classes"]) == 100
    assert "confusion" not in details
    assert details["mistakes"][0] == {"label": "0", "predicted": "299", "rows": 1}
