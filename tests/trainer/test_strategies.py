"""Exactly what a strategy declares learns; everything else stays as it was, bit by bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.strategy import StrategyType
from finetune_trainer.gathering import trainable_state
from finetune_trainer.model import parameter_counts
from finetune_trainer.strategies import STRATEGIES
from tests.support.jobs import a_job, a_session
from tests.support.models import changed, save_tiny_llama, state_of

DECLARED = {
    "Full": (lambda name: True, {}),
    "LoRA": (lambda name: "lora_" in name, {}),
    "QLoRA": (lambda name: "lora_" in name, {}),
    "LoRA on two modules": (lambda name: "lora_" in name and ("q_proj" in name or "down_proj" in name),
                            {"targetModules": ["q_proj", "mlp.down_proj"]}),
    "LoRA with a whole module": (lambda name: "lora_" in name or "modules_to_save" in name,
                                 {"modulesToSave": ["lm_head"]}),
    "LoRA with magnitudes": (lambda name: "lora_" in name, {"doRA": True}),
    "QLoRA with a whole module": (lambda name: "lora_" in name or "modules_to_save" in name,
                                  {"modulesToSave": ["norm"]}),
}  # fmt: skip


@pytest.mark.parametrize("task", ["Instruction", "CausalLM"])
@pytest.mark.parametrize("case", DECLARED)
def test_exactly_the_declared_parameters_move(tmp_path, case, task):
    declared, lora = DECLARED[case]
    job = a_job(tmp_path, case.split()[0], task, **({"lora": lora} if lora else {}))
    session = a_session(job, tmp_path / "scratch")
    before = state_of(session.trainer.model)
    session.trainer.train()
    after = state_of(session.trainer.model)
    assert before.keys() == after.keys()
    assert changed(before, after) == {name for name in before if declared(name)}


@pytest.mark.parametrize("strategy", ["Full", "LoRA", "QLoRA"])
def test_what_learns_is_float32_also_after_the_trainer_was_built(tmp_path, strategy):
    save_tiny_llama(tmp_path / "model", torch.bfloat16)
    session = a_session(a_job(tmp_path, strategy, model={"dtype": "bfloat16"}), tmp_path / "scratch")
    assert {
        parameter.dtype for parameter in trainable_state(session.trainer.model, session.trainer.learning).values()
    } == {torch.float32}


def test_an_untrained_adapter_is_the_base(tmp_path):
    session = a_session(a_job(tmp_path, lora={"modulesToSave": ["lm_head"]}), tmp_path / "scratch")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(4, 40)[None]
    session.trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(session.trainer.model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_options_of_lora_reach_peft(tmp_path):
    lora = {"rank": 3, "alpha": 7, "dropout": 0.25, "targetModules": ["v_proj"], "rsLoRA": True, "doRA": True}
    session = a_session(a_job(tmp_path, lora=lora), tmp_path / "scratch")
    config = session.trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.25)
    assert (config.target_modules, config.use_rslora, config.use_dora) == ({"v_proj"}, True, True)
    dropouts = {m.p for n, m in session.trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.25}


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_options_of_quantisation_reach_the_weights(tmp_path, kind, double):
    job = a_job(tmp_path, "QLoRA", quantization={"type": kind, "doubleQuant": double})
    session = a_session(job, tmp_path / "scratch")
    layer = session.trainer.model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    assert layer.weight.quant_state.quant_type == kind
    assert layer.weight.quant_state.nested is double


def test_a_quantised_base_counts_the_parameters_that_it_stands_for(tmp_path):
    whole = a_session(a_job(tmp_path, "LoRA"), tmp_path / "one")
    quantised = a_session(a_job(tmp_path, "QLoRA"), tmp_path / "two")
    assert quantised.parameters == whole.parameters == parameter_counts(whole.trainer.model)


def test_an_evaluation_takes_no_gradient_from_a_quantised_model(tmp_path):
    # bitsandbytes repacks 4-bit weights for a kernel without a derivative when they are first used in eval mode.
    session = a_session(a_job(tmp_path, "QLoRA", lora={"dropout": 0}), tmp_path / "scratch")
    before = _gradients(session.trainer)
    session.trainer.evaluate()
    after = _gradients(session.trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _gradients(trainer) -> dict[str, torch.Tensor]:
    model = trainer.model
    model.train()
    model.zero_grad()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model, dict(batch)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_strategy_of_the_api_exists():
    assert set(STRATEGIES) == set(StrategyType)
    assert {kind.output_kind for kind in STRATEGIES.values()} == {"adapter", "model"}
