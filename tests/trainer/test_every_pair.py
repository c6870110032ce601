"""Every pair of strategy and task that the API allows, as a whole run.

What is declared learns and nothing else, what is delivered answers as what was trained, and a stop in the middle
changes nothing. What is refused is in tests/api.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from finetune_api.contract import Result
from finetune_api.job import FineTuneJob, StrategyType, TaskType
from finetune_api.pairs import ALLOWED
from finetune_trainer import verification
from finetune_trainer.adapters import load_adapter
from finetune_trainer.export import Exporter
from finetune_trainer.session import Start
from tests.support.images import an_image_job
from tests.support.jobs import a_job, run
from tests.support.models import changed, state_of

HEADS = ("score.", "classifier.")
"""New heads of the tiny Llama and the tiny ViT: they learn whatever the strategy is."""
WHOLE = ("Full", "Partial", "LayerNorm", "Additive", "Green")
OPTIONS: dict[str, dict[str, Any]] = {
    "Partial": {"select": {"layers": {"last": 1}}},
    "LoRA": {"lora": {"rank": 4}},
    "QLoRA": {"lora": {"rank": 4}},
    "Adapter": {"adapter": {"size": 8, "activation": "gelu"}},
    "PromptTuning": {"promptTuning": {"tokens": 4}},
    "PrefixTuning": {"prefixTuning": {"tokens": 4}},
    "Additive": {"additive": {"blocks": 1, "placement": "Last"}},
    "Green": {"green": {"everySteps": 4}},
}
DECLARED = {
    "Full": lambda name: True,
    "Partial": lambda name: ".layers.1." in name,
    "LoRA": lambda name: "lora_" in name,
    "QLoRA": lambda name: "lora_" in name,
    "Adapter": lambda name: ".adapter." in name or (".layers." in name and "layernorm" in name),
    "PromptTuning": lambda name: "prompt_encoder" in name,
    "PrefixTuning": lambda name: "prompt_encoder" in name,
    "IA3": lambda name: "ia3_l" in name,
    "LayerNorm": lambda name: "norm" in name,
    "Additive": lambda name: ".layers.2." in name,
}
RATES = {"PromptTuning": 5e-2, "PrefixTuning": 5e-2, "IA3": 5e-2, "LayerNorm": 2e-2}
STEPS, MIDDLE = 8, 4


@dataclass
class Outcome:
    """A run, and what was seen of its model on the way."""

    root: Path
    job: FineTuneJob
    result: Result
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    probe: dict[str, torch.Tensor] = field(default_factory=dict)
    answer: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def strategy(self) -> str:
        return self.job.spec.strategy.type.value

    @property
    def last_weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.root / f"out/checkpoints/step-{STEPS:08d}/trainable.safetensors")


def pair_job(root: Path, strategy: str, task: str) -> FineTuneJob:
    options = dict(OPTIONS.get(strategy, {}))
    options["hyperparameters"] = {"maxSteps": STEPS, "epochs": 10, "learningRate": RATES.get(strategy, 5e-3)}
    options["checkpoint"] = {"everySteps": MIDDLE}
    return (
        an_image_job(root, strategy, **options)
        if task == "ImageClassification"
        else a_job(root, strategy, task, **options)
    )


def watched(root: Path, strategy: str, task: str) -> Outcome:
    """Run the pair, and look at its model before the first step and before it is delivered."""
    job = pair_job(root, strategy, task)
    seen: dict[str, Any] = {}
    opened, deliver = Start.open, Exporter.deliver

    def open_and_look(self: Start, *arguments: Any) -> Any:
        session = opened(self, *arguments)
        seen["before"] = state_of(session.trainer.model)
        return session

    def look_and_deliver(self: Exporter, *arguments: Any) -> Any:
        model = self.session.trainer.model
        seen["probe"] = self.session.task.probe(model)
        seen["after"], seen["answer"] = state_of(model), verification.logits(model, seen["probe"])
        return deliver(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Start, "open", open_and_look)
        patch.setattr(Exporter, "deliver", look_and_deliver)
        return Outcome(root, job, run(job, root / "scratch"), **seen)


@pytest.fixture(scope="module", params=[(s.value, t.value) for s, t in ALLOWED], ids="-".join)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return watched(tmp_path_factory.mktemp("pair"), *request.param)


def test_the_loss_falls(outcome: Outcome) -> None:
    losses = [entry["loss"] for entry in report_of(outcome)["history"] if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < sum(losses[:3])


def test_exactly_what_is_declared_moves(outcome: Outcome) -> None:
    moved, names = changed(outcome.before, outcome.after), outcome.before
    if outcome.strategy == "Green":
        # Which tensors it takes is its own choice (see test_green.py); not all, or it would be Full.
        assert moved < set(names)
        assert {name for name in names if name.startswith(HEADS)} <= moved
        return
    declared = DECLARED[outcome.strategy]
    # PEFT keeps a copy of the head that it replaces.
    heads = {name for name in names if is_head(name) and "original_module" not in name}
    assert moved == heads | {name for name in names if declared(name) and not is_head(name)}


def test_what_is_delivered_answers_as_what_was_trained(outcome: Outcome) -> None:
    model = plainly_loaded(outcome)
    answer = verification.logits(model, outcome.probe)
    # On CPUs with AVX512-BF16 plain bitsandbytes computes 4-bit layers in bfloat16 once a model is evaluated.
    tolerance = 5e-3 if outcome.strategy == "QLoRA" else 1e-4
    assert torch.allclose(answer, outcome.answer, atol=tolerance)


def test_a_stop_in_the_middle_changes_nothing(outcome: Outcome) -> None:
    expected = outcome.last_weights
    out = outcome.root / "out"
    for path in (out / "result.json", out / f"checkpoints/step-{STEPS:08d}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(outcome.job, outcome.root / "scratch-2", attempt=2)
    found = outcome.last_weights
    assert again.steps == STEPS
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def is_head(name: str) -> bool:
    return any(part in f"{name}." for part in (".score.", ".classifier.")) or name.startswith(HEADS)


def report_of(outcome: Outcome) -> dict[str, Any]:
    return dict(json.loads((outcome.root / "out/report/report.json").read_text()))


def plainly_loaded(outcome: Outcome) -> torch.nn.Module:
    """As whoever downloads it does it, with transformers and PEFT or, for bottlenecks, our loader."""
    task, folder = outcome.job.spec.task.type, outcome.root / "out" / outcome.result.output.kind
    loader = {
        TaskType.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
        TaskType.REGRESSION: transformers.AutoModelForSequenceClassification,
        TaskType.IMAGE_CLASSIFICATION: transformers.AutoModelForImageClassification,
    }.get(task, transformers.AutoModelForCausalLM)
    if outcome.strategy in WHOLE:
        return loader.from_pretrained(folder)
    settings: dict[str, Any] = {}
    if loader is not transformers.AutoModelForCausalLM:
        settings = {"num_labels": {TaskType.REGRESSION: 1}.get(task, 3), "ignore_mismatched_sizes": True}
    if loader is transformers.AutoModelForSequenceClassification:
        settings["pad_token_id"] = 0
    if outcome.strategy == "QLoRA":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "score", "classifier"],
        )
    base = loader.from_pretrained(outcome.root / "model", **settings)
    put_on = load_adapter if outcome.strategy == StrategyType.ADAPTER.value else PeftModel.from_pretrained
    return put_on(base, str(folder))
