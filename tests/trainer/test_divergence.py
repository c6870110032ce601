"""A loss or gradient that is not finite never reaches a weight."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.errors import DivergedError
from finetune_trainer.result import Output
from finetune_trainer.session import Start
from tests.support.jobs import a_context, a_job, a_session, run
from tests.support.models import changed, save_tiny_llama, state_of


def test_the_step_is_not_taken(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    session = a_session(a_job(tmp_path, "Full"), tmp_path / "scratch")
    before = state_of(session.trainer.model)
    with pytest.raises(DivergedError, match="in step 1; that step was not taken"):
        session.trainer.train()
    assert not changed(before, state_of(session.trainer.model))


def explode_at(trainer, steps: list[int]) -> None:
    """Let the gradient be infinite in these steps, each time once."""
    taken = trainer.training_step

    def training_step(*args, **named):
        loss = taken(*args, **named)
        if trainer.state.global_step + 1 in steps:
            steps.remove(trainer.state.global_step + 1)
            next(p for p in trainer.model.parameters() if p.grad is not None).grad[0, 0] = torch.inf
        return loss

    trainer.training_step = training_step


@pytest.mark.parametrize(("steps", "survives"), [([3], True), ([3, 3], False), ([2], False)])
def test_the_second_time_from_the_same_checkpoint_is_the_last(tmp_path, monkeypatch, steps, survives):
    # A checkpoint after every second step: what happens in step 2 has nothing to go back to.
    opened = Start.open

    def exploding(*args):
        session = opened(*args)
        explode_at(session.trainer, steps)
        return session

    monkeypatch.setattr(Start, "open", exploding)
    job = a_job(tmp_path, checkpoint={"everySteps": 2})
    context = a_context(job, tmp_path / "scratch")
    if survives:
        assert run(job, context.scratch, 1, context).steps == 6
        assert "once more from step 2" in context.reporter.snapshot().warnings[-1]
    else:
        with pytest.raises(DivergedError) as caught:
            run(job, context.scratch, 1, context)
        assert "learningRate" in caught.value.advice


def test_a_pod_that_is_lost_after_the_first_time_does_not_give_a_third_try(tmp_path, monkeypatch):
    steps = [5, 5]

    def exploding(*args):
        session = opened(*args)
        explode_at(session.trainer, steps)
        return session

    opened = Start.open
    monkeypatch.setattr(Start, "open", exploding)
    job = a_job(tmp_path, checkpoint={"everySteps": 2})
    lost = Output.keep_divergence

    def lose_the_pod(*args):
        lost(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "keep_divergence", lose_the_pod)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "first", 1)
    with pytest.raises(DivergedError, match="the second time after the checkpoint of step 4"):
        run(job, tmp_path / "second", 2)
    assert steps == []


def test_after_a_newer_checkpoint_a_step_is_tried_again(tmp_path, monkeypatch):
    opened, steps = Start.open, [3, 5]

    def exploding(*args):
        session = opened(*args)
        explode_at(session.trainer, steps)
        return session

    monkeypatch.setattr(Start, "open", exploding)
    assert run(a_job(tmp_path, checkpoint={"everySteps": 2}), tmp_path / "scratch").steps == 6
    assert steps == []


def test_a_run_that_goes_on_after_a_step_that_was_not_finite_ends_with_the_same_weights(tmp_path, monkeypatch):
    # Noise on the embeddings is drawn in every step, and added by a hook that must not be there twice.
    opened, bad = Start.open, [3]
    for name, steps in (("one", []), ("two", bad)):

        def exploding(*args, steps=steps):
            session = opened(*args)
            explode_at(session.trainer, steps)
            return session

        monkeypatch.setattr(Start, "open", exploding)
        job = a_job(tmp_path / name, "Full", checkpoint={"everySteps": 2}, hyperparameters={"neftuneAlpha": 5})
        run(job, tmp_path / name / "scratch")
    assert bad == [], "the gradient was infinite once"
    one, two = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
