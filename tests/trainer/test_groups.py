"""Learning rates by layer and by part, and what weight decay spares; without them the library's own groups."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from finetune_api.hyperparameters import Hyperparameters
from finetune_api.selection import ModuleKind
from finetune_trainer.errors import StoppedError, UsageError
from finetune_trainer.groups import peak_rates, spared
from tests.support.architectures import tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet, tiny_vit
from tests.support.jobs import a_job, a_session, run
from tests.support.models import state_of
from tests.trainer.test_best import attempt


def values(**said) -> Hyperparameters:
    return Hyperparameters.from_wire({"learningRate": 1.0} | said)


def names_of(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def rates_of(model, **said) -> dict[str, float]:
    return peak_rates(
        model, {n for n, parameter in model.named_parameters() if parameter.requires_grad}, values(**said)
    )


# --- layerDecay ------------------------------------------------------------------------------------------------------

# Patterns of names, the first that matches counts, and to which power of the decay its rate goes.
DEPTHS = {
    "Llama": (tiny_llama, {r"embed": 3, r"layers\.0": 2, r"layers\.1": 1, r"norm|lm_head": 0}),
    "BERT": (tiny_bert, {r"embeddings": 4, r"layer\.0": 3, r"layer\.1": 2, r"layer\.2": 1, r"pooler|classifier": 0}),
    "GPT-2, whose head is its embedding": (tiny_gpt2, {r"wte|wpe": 4, r"h\.0": 3, r"h\.1": 2, r"h\.2": 1, r"ln_f": 0}),
    "ViT": (tiny_vit, {r"embeddings": 4, r"layers\.0": 3, r"layers\.1": 2, r"layers\.2": 1, r"layernorm|class": 0}),
    "ResNet": (tiny_resnet, {r"embedder": 5, r"stages\.0\.layers\.0": 4, r"stages\.0\.layers\.1": 3,
                             r"stages\.1\.layers\.0": 2, r"stages\.1\.layers\.1": 1, r"classifier": 0}),
}  # fmt: skip


@pytest.mark.parametrize("family", DEPTHS)
def test_rates_fall_from_the_head_to_the_embedding_biases_and_norms_included(family):
    build, powers = DEPTHS[family]
    rates = rates_of(build(), layerDecay=0.5)
    assert rates == {
        name: 0.5 ** next(p for pattern, p in powers.items() if re.search(pattern, name)) for name in rates
    }
    assert set(rates) == names_of(build())


def test_adapters_learn_at_the_rate_of_the_layer_that_they_sit_in():
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    rates = rates_of(model, layerDecay=0.5)
    assert {name for name in rates if "lora_" not in name} == {n for n in rates if "modules_to_save" in n}
    for name, rate in rates.items():
        layer = re.search(r"layer\.(\d)", name)
        assert rate == (0.5 ** (3 - int(layer[1])) if layer else 1.0), name


def test_a_model_without_blocks_has_no_layers_to_decay_by():
    with pytest.raises(UsageError, match=r"spec\.hyperparameters\.layerDecay: the model has no blocks"):
        peak_rates(torch.nn.Linear(2, 2), {"weight", "bias"}, values(layerDecay=0.9))


# --- learningRateGroups ----------------------------------------------------------------------------------------------


def group(rate: float, **select) -> dict:
    return {"select": select, "learningRate": rate}


def test_the_first_group_that_names_a_parameter_counts():
    groups = [group(3.0, modules=["Attention"]), group(2.0, layers={"last": 1}), group(4.0, modules=["Embedding"])]
    rates = rates_of(tiny_llama(), learningRateGroups=groups)
    assert rates["model.layers.1.self_attn.q_proj.weight"] == 3.0
    assert rates["model.layers.1.mlp.up_proj.weight"] == rates["model.layers.1.input_layernorm.weight"] == 2.0
    assert rates["model.layers.0.mlp.up_proj.weight"] == rates["lm_head.weight"] == 1.0
    assert rates["model.embed_tokens.weight"] == 4.0


def test_layers_decay_from_the_rates_of_the_groups():
    rates = rates_of(tiny_llama(), layerDecay=0.5, learningRateGroups=[group(8.0, modules=["Attention", "Head"])])
    assert rates["lm_head.weight"] == 8.0
    assert rates["model.layers.0.self_attn.q_proj.weight"] == 2.0
    assert rates["model.layers.0.mlp.up_proj.weight"] == 0.25


REFUSED = {
    "a block that the model does not have": (
        [group(2.0, layers={"indices": [7]})],
        r"learningRateGroups\[0\]\.select\.layers\.indices: there is no block 7",
    ),
    "a kind that the model does not have": (
        [group(2.0, modules=["Head"]), group(2.0, modules=["LayerNorm"], layers={"first": 3})],
        r"learningRateGroups\[1\]\.select\.layers\.first is 3, but the model has only 2 blocks",
    ),
    "a part that is frozen": (
        [group(2.0, modules=["Embedding"])],
        r"learningRateGroups\[0\]\.select: nothing that learns lies in it \(choose from what learns: Attention, Head; "
        r"blocks 0, 1\)",
    ),
    "a part that an earlier group has": (
        [group(2.0, layers={"last": 2}), group(3.0, modules=["Attention"])],
        r"learningRateGroups\[1\]\.select: groups before it have all that it names",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_group_without_effect_is_refused(case):
    groups, message = REFUSED[case]
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name or "lm_head" in name)
    with pytest.raises(UsageError) as refusal:
        rates_of(model, learningRateGroups=groups)
    assert re.search(message, f"{refusal.value.message} ({refusal.value.advice})")


def test_a_wrong_group_is_refused_before_anything_is_measured(tmp_path):
    job = a_job(tmp_path, hyperparameters={"learningRateGroups": [group(2.0, modules=["Head"])]})
    with pytest.raises(UsageError, match=r"spec\.hyperparameters\.learningRateGroups\[0\]\.select"):
        run(job, tmp_path / "scratch")
    assert not list((tmp_path / "out/report").glob("baseline*"))


# --- weight decay ----------------------------------------------------------------------------------------------------


def test_kinds_are_spared_from_decay():
    assert spared(tiny_llama(), []) == frozenset()
    assert spared(tiny_llama(), [ModuleKind.EMBEDDING, ModuleKind.HEAD]) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    with pytest.raises(UsageError, match=r"spec\.hyperparameters\.noWeightDecay: the model has no Head of its own"):
        spared(tiny_gpt2(), [ModuleKind.HEAD])


@pytest.mark.parametrize("options", [{}, {"layerDecay": 0.5}], ids=["one rate", "several"])
def test_decay_moves_what_no_gradient_moves_unless_it_is_spared(tmp_path, options):
    for kinds, moves in (([], True), (["Embedding"], False)):
        hyperparameters = {"weightDecay": 0.5, "noWeightDecay": kinds, "maxSteps": 3} | options
        trainer = a_session(a_job(tmp_path, "Full", hyperparameters=hyperparameters), tmp_path / str(moves)).trainer
        used = {token for row in trainer.train_dataset for token in row["input_ids"]}
        unused = sorted(set(range(272)) - used)
        before = state_of(trainer.model)
        trainer.train()
        after, name = state_of(trainer.model), "model.embed_tokens.weight"
        assert torch.equal(before[name][unused], after[name][unused]) is not moves
        assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


# --- the optimizer ---------------------------------------------------------------------------------------------------


def described(groups) -> list[tuple]:
    return [({id(it) for it in group["params"]}, group["lr"], group["weight_decay"]) for group in groups]


@pytest.mark.parametrize("strategy", ["Full", "LoRA"])
def test_without_options_the_groups_are_the_librarys(tmp_path, strategy):
    job = a_job(tmp_path, strategy, hyperparameters={"weightDecay": 0.1})
    trainer = a_session(job, tmp_path / "scratch").trainer
    ours = trainer.create_optimizer()
    trainer.optimizer = None
    theirs = Trainer.create_optimizer(trainer)
    assert type(ours) is type(theirs)
    assert described(ours.param_groups) == described(theirs.param_groups)
    assert (trainer.rates, trainer.undecayed) == ({}, frozenset())


def test_groups_of_one_rate_train_bit_by_bit_as_none(tmp_path):
    trained = []
    for number, said in enumerate([{}, {"layerDecay": 1.0}]):
        job = a_job(tmp_path, "Full", hyperparameters={"weightDecay": 0.1} | said)
        trainer = a_session(job, tmp_path / str(number)).trainer
        trainer.train()
        trained.append(state_of(trainer.model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "sgd"])
def test_every_optimizer_takes_the_groups_and_the_schedule_scales_each(tmp_path, optimizer):
    said = {"optimizer": optimizer, "layerDecay": 0.5, "weightDecay": 0.1, "scheduler": "inverseSqrt"}
    plain = {name: value for name, value in said.items() if name != "layerDecay"}
    classes = []
    for number, hyperparameters in enumerate((plain, said)):
        trainer = a_session(a_job(tmp_path, "Full", hyperparameters=hyperparameters), tmp_path / str(number)).trainer
        trainer.train()
        classes.append(type(trainer.optimizer.optimizer))
    groups = trainer.optimizer.param_groups
    assert classes[0] is classes[1]
    assert [group["initial_lr"] for group in groups[::2]] == [5e-3, 2.5e-3, 1.25e-3, 0.625e-3]
    assert len({round(group["lr"] / group["initial_lr"], 9) for group in groups}) == 1
    assert 0 < groups[0]["lr"] < 5e-3
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0.1, 0, 0.1, 0, 0.1]


def test_the_rate_that_is_shown_is_the_highest(tmp_path):
    groups = [group(2e-2, modules=["Attention"])]
    run(a_job(tmp_path, hyperparameters={"layerDecay": 0.5, "learningRateGroups": groups}), tmp_path / "scratch")
    history = json.loads((tmp_path / "out/report/report.json").read_text())["history"]
    assert max(entry["learning_rate"] for entry in history if "learning_rate" in entry) == pytest.approx(1e-2, rel=0.1)


def test_a_run_with_groups_that_was_stopped_ends_with_the_same_weights(tmp_path):
    options = {"layerDecay": 0.7, "noWeightDecay": ["Embedding"], "weightDecay": 0.1, "dropout": 0.1, "maxSteps": 7}
    groups = [group(2e-2, modules=["Head"]), group(1e-3, layers={"first": 1})]
    for name in ("one", "two"):
        job = a_job(tmp_path / name, "Full", hyperparameters=options | {"learningRateGroups": groups})
        if name == "two":
            with pytest.raises(StoppedError):
                attempt(job, tmp_path / name, 1, step=3)
        attempt(job, tmp_path / name, 2)
    one, two = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
