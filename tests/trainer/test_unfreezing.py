"""Gradual unfreezing: each stage trains exactly what it should, and a stop at any step changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainingArguments

from finetune_trainer import learning
from finetune_trainer.errors import StoppedError
from finetune_trainer.progress import Reporter
from finetune_trainer.statistics import hold_frozen_statistics
from finetune_trainer.tasks.trainer import JobTrainer
from finetune_trainer.unfreezing import UnfreezingCallback, stages
from tests.support.architectures import IMAGE, tiny_resnet
from tests.support.jobs import a_job, a_session
from tests.support.models import changed, save_tiny_bert, save_tiny_llama, state_of
from tests.trainer.test_best import attempt
from tests.trainer.test_labeled_text import a_labeled_job
from tests.trainer.test_stages import learning_of, options

LAYERS = 3


class Movements(TrainerCallback):
    """Which tensors each step has moved."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_step_begin(self, args, state, control, *, model, **_):
        self._before = state_of(model)

    def on_optimizer_step(self, args, state, control, *, model, **_):
        self.moved.append(changed(self._before, state_of(model)))


def an_unfreezing_job(root: Path, strategy: str = "Full", hyperparameters: dict | None = None, **spec):
    """Three blocks, eight steps of five an epoch; at a constant rate with decay every step moves all that learns."""
    save_tiny_llama(root / "model", num_hidden_layers=LAYERS)
    values = {"maxSteps": 8, "scheduler": "constant", "warmupRatio": 0, "weightDecay": 0.1}
    spec = {"unfreezing": {"everySteps": 2}} | spec
    return a_job(root, strategy, hyperparameters=values | (hyperparameters or {}), **spec)


CASES = {
    "by steps": ("Full", {"everySteps": 2}, {}, [1, 1, 2, 2, 3, 3, 4, 4]),
    "by epochs": ("Full", {"everyEpochs": 0.4, "layersPerStage": 2}, {}, [1, 1, 2, 2, 3, 3, 3, 3]),
    "by epochs with accumulation": ("Full", {"everyEpochs": 1, "layersPerStage": 3},
                                    {"gradientAccumulationSteps": 2}, [1, 1, 1, 2, 2, 2, 2, 2]),
    "by named stages": ("Full", {"everySteps": 3, "stages": [{"modules": ["LayerNorm", "Head"]},
                                                             {"layers": {"last": 1}}, {"modules": ["Attention"]}]},
                        {}, [1, 1, 1, 2, 2, 2, 3, 3]),
    "some blocks": ("Partial", {"everySteps": 2}, {"select": {"layers": {"last": 2}}}, [1, 1, 2, 2, 2, 2, 2, 2]),
    "norms": ("LayerNorm", {"everySteps": 2}, {}, [1, 1, 2, 2, 3, 3, 4, 4]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_step_moves_exactly_what_its_stage_says(tmp_path, case):
    strategy, said, more, expected = CASES[case]
    spec = {name: more[name] for name in ("select",) if name in more}
    values = {name: value for name, value in more.items() if name not in spec}
    job = an_unfreezing_job(tmp_path, strategy, values, unfreezing=said, **spec)
    trainer = a_session(job, tmp_path / "scratch").trainer
    schedule = stages(trainer.model, trainer.learning, set(), job.spec.strategy.unfreezing)
    movements = Movements()
    trainer.add_callback(movements)
    trainer.train()
    assert movements.moved == [schedule[stage - 1] for stage in expected]
    assert schedule[max(expected) - 1] == trainer.learning


def test_a_new_head_learns_from_the_first_stage_on(tmp_path):
    save_tiny_bert(tmp_path / "model")
    unfreezing = {"everySteps": 2, "stages": [{"layers": {"last": 1}}, {"layers": {"first": 1}}]}
    values = {"scheduler": "constant", "warmupRatio": 0, "weightDecay": 0.1, "maxSteps": 4}
    job = a_labeled_job(tmp_path, "Full", "classes", unfreezing=unfreezing, hyperparameters=values)
    trainer = a_session(job, tmp_path / "scratch").trainer
    movements = Movements()
    trainer.add_callback(movements)
    trainer.train()
    first = movements.moved[0]
    assert {name for name in first if "layer." not in name} == {"classifier.weight", "classifier.bias"}
    assert all("layer.1." in name or "classifier" in name for name in first)
    assert movements.moved == [first, first, set(trainer.learning), set(trainer.learning)]


def test_what_has_not_begun_has_no_gradient_and_empty_moments(tmp_path):
    trainer = a_session(an_unfreezing_job(tmp_path, hyperparameters={"maxSteps": 1}), tmp_path / "scratch").trainer
    trainer.train()
    named, state = dict(trainer.model.named_parameters()), trainer.optimizer.optimizer.state
    waiting = [parameter for name, parameter in named.items() if "layers" in name or "embed" in name]
    assert len(state) == len(named)
    for parameter in waiting:
        assert (parameter.requires_grad, parameter.grad) == (False, None)
        assert float(state[parameter]["step"]) == 0
        assert not any(state[parameter][moment].any() for moment in ("exp_avg", "exp_avg_sq"))
    assert float(state[named["lm_head.weight"]]["step"]) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "sgd"])
def test_moments_made_beforehand_are_those_of_a_first_step(tmp_path, optimizer, monkeypatch):
    trained = []
    for number in range(2):
        if number:
            monkeypatch.setattr(learning, "create_moments", lambda optimizer: None)
        job = an_unfreezing_job(tmp_path / str(number), hyperparameters={"optimizer": optimizer})
        trainer = a_session(job, tmp_path / f"scratch-{number}").trainer
        trainer.train()
        trained.append(state_of(trainer.model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputing"])
def test_the_backward_pass_ends_at_the_lowest_block_that_learns(tmp_path, recompute):
    job = an_unfreezing_job(tmp_path, hyperparameters={"gradientCheckpointing": recompute, "maxSteps": 8})
    trainer = a_session(job, tmp_path / "scratch").trainer
    counted = []
    step = trainer.training_step

    def count(*arguments, **named):
        with FlopCounterMode(display=False) as counter:
            loss = step(*arguments, **named)
        counted.append((counter.get_total_flops(), arguments[1]["input_ids"].numel()))
        return loss

    trainer.training_step = count
    trainer.train()
    # Operations a token at each stage: of matrix products, twice the weights forward and four times backward.
    block, head = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128, 64 * 272
    lowest, *later = [flops / tokens for flops, tokens in counted[::2]]
    # The head is asked for the tokens that have a label only.
    assert 2 * LAYERS * block < lowest < 2 * LAYERS * block + 6 * head
    again = 2 * block if recompute else 0
    for stage, flops in enumerate(later, start=1):
        assert flops - lowest == pytest.approx(stage * (4 * block + again), rel=0.1)


def test_recomputing_activations_changes_no_number(tmp_path):
    trained = []
    for recompute in (False, True):
        job = an_unfreezing_job(tmp_path / str(recompute), hyperparameters={"gradientCheckpointing": recompute})
        trainer = a_session(job, tmp_path / f"scratch-{recompute}").trainer
        trainer.train()
        trained.append(state_of(trainer.model))
    assert all(torch.allclose(trained[0][name], trained[1][name], atol=1e-6) for name in trained[0])


def test_elements_that_fisher_information_left_out_stay_in_every_stage(tmp_path):
    select = {"fisher": {"fraction": 0.5, "samples": 4}}
    job = an_unfreezing_job(tmp_path, "LayerNorm", select=select, unfreezing={"everySteps": 2, "layersPerStage": 2})
    trainer = a_session(job, tmp_path / "scratch").trainer
    before = state_of(trainer.model)
    trainer.train()
    after = state_of(trainer.model)
    moved = {name: int((before[name] != after[name]).sum()) for name in trainer.learning}
    elements = {n: getattr(p, "learning_elements", p.numel()) for n, p in trainer.model.named_parameters()}
    assert moved == {name: elements[name] for name in trainer.learning}
    assert any(count < before[name].numel() for name, count in moved.items())


def test_batch_norms_that_have_not_begun_keep_their_statistics(tmp_path):
    model = tiny_resnet()
    hold_frozen_statistics(model)
    rows = [{"pixel_values": torch.randn(3, IMAGE, IMAGE), "labels": number % 3} for number in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, save_strategy="no", report_to="none",
        use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = JobTrainer(model, arguments, train_dataset=rows)
    trainer.learning = frozenset(learning_of(model))
    schedule = stages(model, trainer.learning, set(), options(layersPerStage=2))
    trainer.add_callback(UnfreezingCallback(schedule, options(everySteps=1, layersPerStage=2), Reporter()))
    movements = Movements()
    trainer.add_callback(movements)
    trainer.train()
    assert movements.moved[0] == {"classifier.1.weight", "classifier.1.bias"}
    assert any("stages.1" in name and "running_mean" in name for name in movements.moved[1])
    assert not any("stages.0" in name or "embedder" in name for name in movements.moved[1])


def test_stages_that_never_begin_are_warned_of(tmp_path):
    job = an_unfreezing_job(tmp_path, unfreezing={"everySteps": 4})
    attempt(job, tmp_path, 1)
    report = (tmp_path / "out/report/report.json").read_text()
    assert "spec.strategy.unfreezing: stage 3 of 4 begins after step 8, but training ends with step 8" in report


# --- stopping and going on -------------------------------------------------------------------------------------------

STOPS = {
    "within the first stage": [1],
    "at the end of the first stage": [2],
    "within a later stage, then at a boundary": [3, 6],
    "at every step": list(range(1, 8)),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    attempt(an_unfreezing_job(root, hyperparameters={"dropout": 0.1}), root, 1)
    return root


def last_checkpoint(root: Path) -> tuple[dict, dict]:
    folder = root / "out/checkpoints/step-00000008"
    return load_file(folder / "trainable.safetensors"), load_file(folder / "optimizer.safetensors")


@pytest.mark.parametrize("case", STOPS)
def test_a_stop_in_any_stage_changes_neither_weights_nor_moments(tmp_path, undisturbed, case):
    job = an_unfreezing_job(tmp_path, hyperparameters={"dropout": 0.1})
    for number, step in enumerate(STOPS[case], start=1):
        with pytest.raises(StoppedError):
            attempt(job, tmp_path, number, step=step)
    attempt(job, tmp_path, 99)
    (expected, moments), (found, others) = last_checkpoint(undisturbed), last_checkpoint(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert moments.keys() == others.keys()
    assert all(torch.equal(moments[name], others[name]) for name in moments)


def test_a_stop_changes_nothing_with_an_optimizer_of_8_bits_either(tmp_path):
    for name, steps in (("one", []), ("two", [3, 4])):
        job = an_unfreezing_job(tmp_path / name, hyperparameters={"optimizer": "adamw8bit", "layerDecay": 0.8})
        for number, step in enumerate(steps, start=1):
            with pytest.raises(StoppedError):
                attempt(job, tmp_path / name, number, step=step)
        attempt(job, tmp_path / name, 9)
    one, two = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
