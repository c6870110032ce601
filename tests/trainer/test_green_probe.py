"""A probe finds what a real step would do to the loss, and leaves no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from finetune_trainer.learning import create_moments, learn
from finetune_trainer.strategies.green import callback as callback_module
from finetune_trainer.strategies.green.importance import Step, _first_useful, importance
from finetune_trainer.strategies.green.undo import unseen
from tests.support.architectures import tiny_bert, tiny_resnet
from tests.support.jobs import a_job, a_session
from tests.support.models import state_of
from tests.support.trainers import a_trainer, image_rows, text_rows

EVERY_STEP = {"type": "Green", "green": {"everySteps": 1}}
ONCE = {"type": "Green", "green": {"everySteps": 1000}}


class AtStep(TrainerCallback):
    """Does something before a step, after Green has chosen."""

    def __init__(self, trainer, step: int, do) -> None:
        self.trainer, self.step, self.do = trainer, step, do
        self.found: Any = None
        fetch = trainer.get_batch_samples

        def fetch_and_keep(*arguments):
            self.data = Step(*fetch(*arguments))
            return self.data

        trainer.get_batch_samples = fetch_and_keep
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.found = self.do(self.trainer, self.data)


def everything(trainer) -> dict[str, Any]:
    """All that training has changed so far, copied."""
    named = dict(trainer.model.named_parameters())
    return {
        "weights and buffers": state_of(trainer.model),
        "gradients": [name for name, it in named.items() if it.grad is not None],
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "step": (trainer.state.global_step, trainer.state.num_input_tokens_seen),
        "tallies": (copy.deepcopy(dict(getattr(trainer, "_metrics", {}))), getattr(trainer, "_total_train_tokens", 0)),
    }


def same(one: Any, two: Any) -> bool:
    """Equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(np.array_equal(one, two)) if isinstance(one, np.ndarray) else one == two


class Watching(TrainerCallback):
    """Looks at everything before and after Green chooses."""

    def __init__(self, trainer) -> None:
        self.trainer, self.differences = trainer, []
        choosing = next(it for it in trainer.callback_handler.callbacks if type(it).__name__ == "Choosing")
        choose = choosing._choose

        def watched() -> list[str]:
            before = everything(trainer)
            names = choose()
            after = everything(trainer)
            self.differences.append([key for key in before if not same(before[key], after[key])])
            return names

        choosing._choose = watched


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit"])
def test_choosing_leaves_no_trace_whatever_the_optimizer(tmp_path, optimizer):
    model = tiny_bert(hidden_dropout_prob=0.1)
    arguments = {"optim": optimizer, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    trainer = a_trainer(tmp_path, model, text_rows(40), EVERY_STEP, **arguments)
    watching = Watching(trainer)
    trainer.train()
    assert watching.differences == [[], [], [], []]


def test_choosing_leaves_running_statistics_as_they_were(tmp_path):
    trainer = a_trainer(tmp_path, tiny_resnet(), image_rows(20), EVERY_STEP)
    watching = Watching(trainer)
    trainer.train()
    assert watching.differences == [[], [], [], []]


def test_choosing_is_not_counted_among_the_tokens_of_a_language_model(tmp_path):
    job = a_job(tmp_path, "Green", green={"everySteps": 1}, hyperparameters={"maxSteps": 3, "dropout": 0.1})
    trainer = a_session(job, tmp_path / "scratch").trainer
    watching = Watching(trainer)
    trainer.train()
    assert watching.differences == [[], [], []]


@pytest.mark.parametrize(("make", "rows"), [(tiny_bert, text_rows(40)), (tiny_resnet, image_rows(40))])
def test_a_run_in_which_everything_is_chosen_is_a_full_one(tmp_path, monkeypatch, make, rows):
    monkeypatch.setattr(callback_module, "select", lambda costs, *_: np.ones(len(costs.names), dtype=bool))
    arguments = {"gradient_accumulation_steps": 2, "warmup_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    green, full = make(), make()
    a_trainer(tmp_path / "green", green, rows, EVERY_STEP, **arguments).train()
    a_trainer(tmp_path / "full", full, rows, {"type": "Full"}, **arguments).train()
    assert same(state_of(green), state_of(full))


def probe(trainer, data: Step) -> dict[str, float]:
    with unseen(trainer):
        learn(trainer.model, {name for name, _ in trainer.model.named_parameters()})
        return importance(trainer, data)


def by_hand(trainer, data: Step) -> dict[str, float]:
    """With a copy of the model and plain gradient descent, without any clipping."""
    model = copy.deepcopy(trainer.model).train()
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        losses = [model(**inputs).loss / len(data.batches) for inputs in data.batches]
        return list(torch.autograd.grad(sum(losses), list(named.values())))

    change = [-trainer.args.learning_rate * gradient for gradient in gradients()]
    with torch.no_grad():
        for parameter, step in zip(named.values(), change, strict=True):
            parameter.add_(step)
    gains = [-float((g * step).sum()) for g, step in zip(gradients(), change, strict=True)]
    return dict(zip(named, np.array(gains) / np.abs(gains).max(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_importance_is_what_the_formula_says(tmp_path, accumulation):
    arguments = {"optim": "sgd", "max_grad_norm": 0, "gradient_accumulation_steps": accumulation, "learning_rate": 0.1}
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = a_trainer(tmp_path, model, text_rows(40), ONCE, **arguments)
    both = AtStep(trainer, 2, lambda *it: (probe(*it), by_hand(*it)))
    trainer.train()
    found, expected = both.found
    assert found.keys() == expected.keys()
    assert [found[name] for name in found] == pytest.approx([expected[name] for name in found], abs=1e-4)
    assert max(map(abs, found.values())) == 1


def test_a_warm_up_that_begins_with_zero_hides_nothing(tmp_path):
    def at_first_step(warmup_steps: int) -> dict[str, float]:
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = a_trainer(tmp_path, model, text_rows(40), ONCE, warmup_steps=warmup_steps)
        probing = AtStep(trainer, 0, probe)
        trainer.train()
        return probing.found

    assert at_first_step(3) == at_first_step(0)


def test_a_loss_scale_that_overflows_is_lowered_for_the_probe_and_put_back(tmp_path):
    def probed(scaler) -> dict[str, float]:
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = a_trainer(tmp_path, model, text_rows(40), ONCE, max_steps=1)

        def with_scale(trainer, data):
            trainer.accelerator.scaler = scaler
            try:
                return probe(trainer, data)
            finally:
                trainer.accelerator.scaler = None

        probing = AtStep(trainer, 0, with_scale)
        trainer.train()
        return probing.found

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = scaler.state_dict()
    found, expected = probed(scaler), probed(None)
    assert [found[name] for name in expected] == pytest.approx(list(expected.values()), abs=1e-4)
    assert scaler.state_dict() == before


def test_what_overshoots_or_overflows_is_judged_by_what_is_left():
    good, bad = np.array([0.5, -0.2]), np.array([-0.5, -0.2])
    broken = np.array([np.nan, 1.0])
    assert _first_useful(good, bad) is good
    assert _first_useful(bad, good) is good
    assert _first_useful(broken, good) is good
    assert _first_useful(broken, bad).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda it: torch.optim.AdamW(it, fused=True),
        lambda it: torch.optim.AdamW(it, weight_decay=0.3, foreach=True),
        lambda it: torch.optim.SGD(it, lr=0.1, momentum=0.9),
        lambda it: torch.optim.SGD(it, lr=0.1),
    ],
)
def test_moments_that_were_created_are_those_of_a_first_step(make):
    def steps(early: bool) -> tuple[list[torch.Tensor], dict]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.tensor([-0.0, 1.0]))]
        optimizer = make(parameters)
        if early:
            untouched = [it.detach().clone() for it in parameters]
            create_moments(optimizer)
            assert all(torch.equal(a.signbit(), b.signbit()) and torch.equal(a, b)
                       for a, b in zip(parameters, untouched, strict=True))  # fmt: skip
        for number in range(4):
            # The second one begins to learn later.
            for parameter in parameters[: 1 + (number >= 2)]:
                parameter.grad = torch.sin(parameter.detach() + number)
            optimizer.step()
        return [it.detach() for it in parameters], optimizer.state_dict()

    assert same(steps(early=True), steps(early=False))
