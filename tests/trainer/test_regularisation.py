"""What keeps a model with a head from learning by heart acts while training, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    DistilBertConfig,
    EsmConfig,
    PretrainedConfig,
    ResNetConfig,
    TimmWrapperConfig,
    TrainingArguments,
    ViTConfig,
)

from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.predictions import PredictionMeter
from finetune_trainer.evaluation.targets import OneClass
from finetune_trainer.model import override_dropout
from finetune_trainer.tasks.head import HeadTrainer
from tests.support.architectures import tiny_bert


def a_trainer(root: Path, model: nn.Module | None = None, **arguments: Any) -> HeadTrainer:
    """Of a classifier with two classes, trained for three steps."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 200, (12, 8), generator=generator)
    rows = [{"input_ids": row, "labels": torch.tensor(number % 2)} for number, row in enumerate(ids)]
    settings: dict[str, Any] = {
        "output_dir": str(root), "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "remove_unused_columns": False, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    model = model or tiny_bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    trainer = HeadTrainer(model, TrainingArguments(**settings | arguments), train_dataset=rows, eval_dataset=rows)
    trainer.learning = frozenset(name for name, _ in model.named_parameters())
    trainer.target = OneClass(["no", "yes"])
    trainer.meter = lambda: PredictionMeter(trainer.target, [])
    return trainer


def first_losses(trainer: HeadTrainer) -> tuple[float, float]:
    """(held-out loss before training, loss of the first step)."""
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


OPTIONS = {
    "label smoothing": {"label_smoothing_factor": 0.5},
    "noise on embeddings": {"neftune_noise_alpha": 50},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_it_is_in_the_training_of_a_classifier_and_not_in_its_evaluation(tmp_path, case):
    held_out, plain = first_losses(a_trainer(tmp_path))
    same, changed = first_losses(a_trainer(tmp_path, **OPTIONS[case]))
    assert same == held_out
    assert changed != pytest.approx(plain, rel=1e-4)


def test_label_smoothing_is_that_of_the_formula(tmp_path):
    # Szegedy et al., 2015, arXiv 1512.00567, section 7: the target is 1 - e on the class and e/K on each of K classes.
    trainer = a_trainer(tmp_path, label_smoothing_factor=0.3)
    batch = next(iter(trainer.get_train_dataloader()))
    logs = trainer.model(input_ids=batch["input_ids"]).logits.log_softmax(dim=-1)
    target = nn.functional.one_hot(batch["labels"], 2) * 0.7 + 0.3 / 2
    expected = -(target * logs).sum(dim=-1).mean()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_noise_on_embeddings_is_gone_after_training(tmp_path):
    trainer = a_trainer(tmp_path, neftune_noise_alpha=5)
    trainer.train()
    assert not trainer.model.get_input_embeddings()._forward_hooks


def test_dropout_acts_while_training_only(tmp_path):
    config = tiny_bert().config
    override_dropout(config, 0.4)
    model = type(tiny_bert())(config)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.4}
    ids = torch.arange(4, 20)[None]
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# --- dropout by architecture -----------------------------------------------------------------------------------------

DROPOUTS = {
    "BERT": (BertConfig(), {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
                            "classifier_dropout": None}),
    "BERT with one of the head": (BertConfig(classifier_dropout=0.1), {"classifier_dropout": 0.3}),
    "DistilBERT": (DistilBertConfig(), {"dropout": 0.3, "attention_dropout": 0.3, "seq_classif_dropout": 0.3}),
    "ViT": (ViTConfig(), {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}),
    "ESM, where one name is a switch": (EsmConfig(vocab_size=8, mask_token_id=1, pad_token_id=0, token_dropout=True),
                                        {"token_dropout": True, "hidden_dropout_prob": 0.3}),
    "timm": (TimmWrapperConfig(architecture="vgg11", model_args={"mlp_ratio": 0.01}),
             {"model_args": {"mlp_ratio": 0.01, "drop_rate": 0.3}}),
}  # fmt: skip


@pytest.mark.parametrize("family", DROPOUTS)
def test_every_probability_of_a_configuration_is_replaced(family):
    config, expected = DROPOUTS[family]
    override_dropout(config, 0.3)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "config",
    [ViTConfig(), TimmWrapperConfig(architecture="vgg11"), TimmWrapperConfig(architecture="inception_v3")],
    ids=["ViT", "VGG", "Inception"],
)
def test_models_of_images_are_built_with_it(config: PretrainedConfig):
    override_dropout(config, 0.3)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}


def test_an_architecture_without_dropout_refuses_it():
    with pytest.raises(UsageError, match=r"spec\.hyperparameters\.dropout: the architecture resnet has no dropout"):
        override_dropout(ResNetConfig(), 0.3)
