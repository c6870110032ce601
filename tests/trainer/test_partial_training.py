"""Partial and LayerNorm train exactly what they select, in every family; all else stays bit by bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

from finetune_api.selection import ModuleKind
from finetune_api.strategy import StrategySpec
from finetune_trainer.errors import DataError, UsageError
from finetune_trainer.fisher import fisher_information, largest, packed, unpacked
from finetune_trainer.loaded import Loaded
from finetune_trainer.result import Output
from finetune_trainer.statistics import hold_frozen_statistics
from finetune_trainer.storage import Store
from finetune_trainer.strategies import strategy_of
from finetune_trainer.structure import Structure
from tests.support.architectures import IMAGE, VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet, tiny_vit
from tests.support.jobs import a_job, a_session, run
from tests.support.models import changed, save_tiny_llama, state_of

A, F, N, E, H = ModuleKind
LENGTH = 12


def text(labels: bool) -> list[dict[str, torch.Tensor]]:
    """Rows of tokens that are their own labels, or have a class."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (24, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row[0] % 2 if labels else row.clone()} for row in ids]


def images() -> list[dict[str, torch.Tensor]]:
    """Noise with a class."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(24, 3, IMAGE, IMAGE, generator=draw)
    return [{"pixel_values": image, "labels": torch.tensor(number % 3)} for number, image in enumerate(pixels)]


FAMILIES = {
    "Llama": (tiny_llama, partial(text, labels=False)),
    "BERT": (tiny_bert, partial(text, labels=True)),
    "GPT-2": (tiny_gpt2, partial(text, labels=False)),
    "ViT": (tiny_vit, images),
    "ResNet": (tiny_resnet, images),
}
TRANSFORMERS = ["Llama", "BERT", "GPT-2", "ViT"]


class DecayingTrainer(Trainer):
    """The library's trainer, with decay on everything: norms and biases too."""

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]


def loaded(family, fresh=(), **settings) -> Loaded:
    build, rows = FAMILIES[family]
    return Loaded(build(), fresh, examples=lambda count: batches(rows()[:count]), **settings)


def batches(rows):
    return [{name: value[None] for name, value in row.items()} for row in rows]


def strategy(kind="Partial", **select):
    wire = {"type": kind} | ({"select": select} if select else {})
    return strategy_of(StrategySpec.from_wire(wire))


def train(strategy, base, rows, folder: Path, **arguments) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A few steps with accumulation, clipping and decay: the trained model, and the state before."""
    model = strategy.prepare(base)
    hold_frozen_statistics(model)
    before = state_of(model)
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = DecayingTrainer(model, TrainingArguments(str(folder), **settings | arguments), train_dataset=rows)
    strategy.attach(trainer)
    trainer.train()
    return model, before


CASES = {
    "the first block": ({"layers": {"first": 1}}, lambda place, last: place.layer == 0),
    "attention of the last block": (
        {"layers": {"last": 1}, "modules": ["Attention"]},
        lambda place, last: place.layer == last and place.kind is A,
    ),
    "feed-forward of a block by number, and the embedding": (
        {"layers": {"indices": [1]}, "modules": ["FeedForward", "Embedding"]},
        lambda place, last: (place.layer == 1 and place.kind is F) or place.kind is E,
    ),
    "norms everywhere": ({"modules": ["LayerNorm"]}, lambda place, last: place.kind is N),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("case", CASES)
def test_exactly_the_selected_part_moves(tmp_path, family, case):
    select, expected = CASES[case]
    model, before = train(strategy(**select), loaded(family), FAMILIES[family][1](), tmp_path)
    structure = Structure.of(model)
    wanted = {name for name, place in structure.places.items() if expected(place, structure.layers - 1)}
    # Under its second name the state has the embedding once more.
    shared = {"lm_head.weight"} if family == "GPT-2" else set()
    assert changed(before, state_of(model)) - shared == wanted


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_layer_norm_trains_all_norms_and_what_is_new(tmp_path, family):
    fresh = ("classifier",) if family in ("BERT", "ViT") else ()
    model, before = train(strategy("LayerNorm"), loaded(family, fresh), FAMILIES[family][1](), tmp_path)
    places = Structure.of(model).places
    wanted = {name for name, place in places.items() if place.kind is N or name.startswith(fresh or "none")}
    assert changed(before, state_of(model)) == wanted


def test_layer_norm_of_some_blocks_leaves_the_norms_outside_alone():
    model = strategy("LayerNorm", layers={"last": 1}).prepare(loaded("BERT"))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {n for n in Structure.of(model).places if "LayerNorm" in n and "layer.2." in n}


def test_layer_norm_on_a_model_of_batch_norms_is_refused():
    with pytest.raises(UsageError) as refusal:
        strategy("LayerNorm").prepare(loaded("ResNet"))
    assert refusal.value.message == "spec.strategy.type: the model has no LayerNorm (its norms are BatchNorm2d)"
    assert refusal.value.advice.startswith("set type to Partial and select to Head")


def test_statistics_of_frozen_batch_norms_stand_still(tmp_path):
    base = loaded("ResNet", fresh=("classifier",))
    model, before = train(strategy(layers={"last": 1}), base, images(), tmp_path)
    block = Structure.of(model).blocks[-1].name
    moved = changed(before, state_of(model))
    assert moved == {name for name in before if name.startswith((block + ".", "classifier"))}
    assert any("running_mean" in name for name in moved)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_in_bfloat16_frozen_layers_take_two_bytes_and_stay_bit_by_bit(tmp_path, family):
    base = loaded(family, compute=torch.bfloat16)
    base.model.to(torch.bfloat16).to(torch.float32)
    stored = state_of(base.model)
    model, before = train(strategy(layers={"last": 1}), base, FAMILIES[family][1](), tmp_path, bf16=True)
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    block = Structure.of(model).blocks[-1].name
    assert changed(before, state_of(model)) == {name for name in before if name.startswith(block + ".")}
    after = {name: tensor.float() for name, tensor in state_of(model).items()}
    assert changed(stored, after) == {name for name in stored if name.startswith(block + ".")}


def test_what_would_lose_bits_in_bfloat16_is_held_in_float32():
    model = strategy(layers={"last": 1}).prepare(loaded("Llama", compute=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


FISHER = {
    "norms": ("LayerNorm", {}),
    "attention": ("Partial", {"modules": ["Attention"]}),
    "a block": ("Partial", {"layers": {"last": 1}}),
}


def masks(strategy, state) -> dict[str, torch.Tensor]:
    return {name: unpacked(bits, state[name].shape) for name, bits in strategy.choice().items()}


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("case", FISHER)
def test_exactly_the_kept_elements_move_under_decay(tmp_path, family, case):
    kind, select = FISHER[case]
    chooses = strategy(kind, **select, fisher={"fraction": 0.3, "samples": 6})
    model, before = train(chooses, loaded(family), FAMILIES[family][1](), tmp_path)
    after, kept = state_of(model), masks(chooses, before)
    assert changed(before, after) == {name for name, mask in kept.items() if mask.any()}
    for name, mask in kept.items():
        assert torch.equal(before[name] != after[name], mask), name
    elements = sum(mask.numel() for mask in kept.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.3 * elements)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "adafactor", "sgd"])
def test_no_optimizer_moves_what_is_not_kept(tmp_path, optimizer):
    chooses = strategy(modules=["FeedForward"], fisher={"fraction": 0.2, "samples": 4})
    model, before = train(chooses, loaded("Llama"), text(labels=False), tmp_path, optim=optimizer)
    after, kept = state_of(model), masks(chooses, before)
    assert changed(before, after) == {name for name, mask in kept.items() if mask.any()}
    for name, mask in kept.items():
        assert not ((before[name] != after[name]) & ~mask).any()
        assert not mask.any() or (before[name] != after[name]).float().mean() > 0.9 * mask.float().mean()


def test_the_gradient_of_what_is_not_kept_does_not_count_for_clipping():
    whole, masked = (
        strategy(modules=["Attention"], **more).prepare(loaded("Llama"))
        for more in ({}, {"fisher": {"fraction": 0.1, "samples": 4}})
    )
    norms = []
    for model in (whole, masked):
        model.eval()
        model(**batches(text(labels=False))[0]).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    assert 0 < norms[1] < norms[0]


def test_a_mask_outlives_freezing_and_unfreezing():
    chooses = strategy(modules=["Attention"], fisher={"fraction": 0.1, "samples": 4})
    model = chooses.prepare(loaded("Llama"))
    kept = {name: mask for name, mask in masks(chooses, state_of(model)).items() if mask.any()}
    for learns in (False, True):
        for name in kept:
            model.get_parameter(name).requires_grad_(learns)
    model(**batches(text(labels=False))[0]).loss.backward()
    for name, mask in kept.items():
        assert torch.equal(model.get_parameter(name).grad != 0, mask)


def test_a_restart_keeps_the_choice():
    first, again = (strategy("LayerNorm", fisher={"fraction": 0.5, "samples": 4}) for _ in range(2))
    first.prepare(loaded("BERT"))
    again.restore(first.choice())
    # Whoever starts again may see other rows; without the choice it would choose by them.
    other = Loaded(tiny_bert(), examples=lambda count: pytest.fail("it looked at data again"))
    model = again.prepare(other)
    assert again.choice() == first.choice()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, mask in masks(again, state_of(model)).items() if mask.any()}


def test_the_information_is_the_mean_square_of_each_rows_gradient():
    model, rows = tiny_bert(), batches(text(labels=True)[:3])
    names = {"classifier.weight", "bert.encoder.layer.1.output.LayerNorm.bias"}
    information = fisher_information(model, names, rows, torch.float32)
    model.eval()
    for name in names:
        squares = torch.zeros_like(information[name])
        for row in rows:
            model.zero_grad()
            scores = model(input_ids=row["input_ids"]).logits.log_softmax(-1)
            scores[0, row["labels"][0]].backward()
            squares += model.get_parameter(name).grad ** 2 / 3
        torch.testing.assert_close(information[name], squares)


def test_the_largest_elements_are_kept_over_all_tensors_together():
    information = {"one": torch.tensor([[5.0, 0.0], [1.0, 1.0]]), "two": torch.tensor([4.0, 1.0])}
    kept = largest(information, 0.5)
    assert kept["one"].tolist() == [[True, False], [True, False]], "of equal values the first"
    assert kept["two"].tolist() == [True, False]
    assert sum(int(mask.sum()) for mask in largest(information, 0.01).values()) == 1


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 7), (2, 3, 4)])
def test_a_mask_fits_into_bits(shape):
    mask = torch.rand(shape) > 0.5
    bits = packed(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, mask.shape), mask)


def test_rows_without_finite_gradients_are_refused():
    base = loaded("ViT")
    with torch.no_grad():
        base.model.vit.layernorm.weight.fill_(float("inf"))
    with pytest.raises(DataError, match="not finite"):
        strategy("LayerNorm", fisher={"fraction": 0.5}).prepare(base)


def test_fisher_over_nothing_but_what_is_new_is_refused():
    with pytest.raises(UsageError, match="learns whole"):
        strategy(modules=["Head"], fisher={"fraction": 0.5}).prepare(loaded("ResNet", fresh=("classifier",)))


def test_a_whole_job_delivers_a_model_that_differs_in_what_was_kept_alone(tmp_path):
    select = {"modules": ["FeedForward"], "fisher": {"fraction": 0.2, "samples": 4}}
    job = a_job(tmp_path, "Partial", select=select, hyperparameters={"optimizer": "adamw8bit", "weightDecay": 0.1})
    result = run(job, tmp_path / "scratch")
    choice = Output(Store.connect({}), job).choice()
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out/model"))
    kept = {name: unpacked(bits, before[name].shape) for name, bits in choice.items()}
    assert changed(before, after) == {name for name, mask in kept.items() if mask.any()}
    assert all(not ((before[name] != after[name]) & ~mask).any() for name, mask in kept.items())
    assert result.trainable_parameters == sum(int(mask.sum()) for mask in kept.values())


def test_a_job_that_starts_again_goes_on_with_what_was_chosen(tmp_path):
    select = {"modules": ["LayerNorm"], "fisher": {"fraction": 0.5, "samples": 4}}
    job = a_job(tmp_path, "Partial", select=select)
    first = a_session(job, tmp_path / "one").strategy.choice()
    again = a_session(job, tmp_path / "two").strategy.choice()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("task", ["Instruction", "CausalLM"])
def test_a_whole_job_in_bfloat16_delivers_what_was_frozen_bit_by_bit(tmp_path, task):
    save_tiny_llama(tmp_path / "model", torch.bfloat16)
    select = {"layers": {"last": 1}, "fisher": {"fraction": 0.5, "samples": 4}}
    run(a_job(tmp_path, "Partial", task, select=select, model={"dtype": "bfloat16"}), tmp_path / "scratch")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out/model"))
    moved = changed(before, after)
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)
