"""Every hyper-parameter reaches the trainer, under whatever name the library has for it."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config

from finetune_api.hyperparameters import Hyperparameters
from finetune_trainer.arguments import accumulation, global_batch
from finetune_trainer.errors import UsageError
from finetune_trainer.model import override_dropout
from tests.support.jobs import a_job, a_session

# What the job says, and what the trainer's arguments must say then.
FIELDS = {
    "epochs": ({"epochs": 2.5, "maxSteps": None}, {"num_train_epochs": 2.5, "max_steps": -1}),
    "max_steps": ({"maxSteps": 4}, {"max_steps": 4}),
    "learning_rate": ({"learningRate": 3e-4}, {"learning_rate": 3e-4}),
    "per_device_batch_size": ({"perDeviceBatchSize": 3}, {"per_device_train_batch_size": 3}),
    "eval_batch_size": ({"evalBatchSize": 7}, {"per_device_eval_batch_size": 7}),
    "gradient_accumulation_steps": ({"gradientAccumulationSteps": 2}, {"gradient_accumulation_steps": 2}),
    "optimizer": ({"optimizer": "adamw8bit"}, {"optim": "adamw_bnb_8bit"}),
    "scheduler": ({"scheduler": "cosineWithRestarts"}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_ratio": ({"warmupRatio": 0.25}, {"warmup_steps": 0.25}),
    "warmup_steps": ({"warmupRatio": 0, "warmupSteps": 5}, {"warmup_steps": 5}),
    "weight_decay": ({"weightDecay": 0.02}, {"weight_decay": 0.02}),
    "beta1": ({"beta1": 0.8}, {"adam_beta1": 0.8}),
    "beta2": ({"beta2": 0.95}, {"adam_beta2": 0.95}),
    "epsilon": ({"epsilon": 1e-6}, {"adam_epsilon": 1e-6}),
    "max_grad_norm": ({"maxGradNorm": 0.3}, {"max_grad_norm": 0.3}),
    "gradient_checkpointing": (
        {"gradientCheckpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "label_smoothing": ({"labelSmoothing": 0.1}, {"label_smoothing_factor": 0.1}),
    "neftune_alpha": ({"neftuneAlpha": 5}, {"neftune_noise_alpha": 5}),
    "seed": ({"seed": 7}, {"seed": 7, "data_seed": 7}),
    "deterministic": ({"deterministic": True}, {"full_determinism": True}),
    "logging_steps": ({"loggingSteps": 3}, {"logging_steps": 3}),
    "data_workers": ({"dataWorkers": 1}, {"dataloader_num_workers": 1}),
    "torch_compile": ({"torchCompile": True}, {"torch_compile": True}),
}
ELSEWHERE = {"max_length", "packing", "dropout", "layer_decay", "learning_rate_groups", "no_weight_decay"}
"""Not the trainer's but the data's, the model's and the parameter groups'; tested below and in their own places."""


def test_no_hyper_parameter_is_forgotten_here():
    assert FIELDS.keys() | ELSEWHERE == Hyperparameters.model_fields.keys()


def test_fewer_ranks_take_more_batches_each_so_that_a_step_learns_from_as_many_rows(tmp_path):
    job = a_job(tmp_path, resources={"nodes": 3, "processesPerNode": 2}, hyperparameters={"perDeviceBatchSize": 5})
    assert [accumulation(job.spec, ranks) for ranks in (6, 3, 2, 1)] == [1, 2, 3, 6]
    assert {global_batch(job.spec, ranks) for ranks in (6, 3, 2, 1)} == {30}
    with pytest.raises(UsageError, match="a step has 6 batches, which 4 ranks cannot divide evenly") as caught:
        accumulation(job.spec, 4)
    assert "gradientAccumulationSteps to a multiple of 2, or run on all 3 nodes" in caught.value.advice
    assert caught.value.exit_code == 64


@pytest.fixture
def still_random():
    """`deterministic` is a switch of the process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("field", FIELDS)
def test_it_reaches_the_trainer(tmp_path, field, still_random):
    said, expected = FIELDS[field]
    arguments = a_session(a_job(tmp_path, hyperparameters=said), tmp_path / "scratch").trainer.args
    found = {name: getattr(arguments, name) for name in expected}
    assert found == expected


def test_the_earlier_of_epochs_and_max_steps_ends_the_run(tmp_path):
    # 20 rows for training in batches of 4: 5 steps an epoch.
    long = a_session(a_job(tmp_path, hyperparameters={"epochs": 1, "maxSteps": 100}), tmp_path / "scratch").trainer
    assert long.train().global_step == 5
    short = a_session(a_job(tmp_path, hyperparameters={"epochs": 9, "maxSteps": 2}), tmp_path / "scratch").trainer
    assert short.train().global_step == 2


def test_nothing_is_reported_to_anybody(tmp_path):
    arguments = a_session(a_job(tmp_path), tmp_path / "scratch").trainer.args
    assert (arguments.report_to, arguments.push_to_hub, arguments.save_total_limit) == ([], False, None)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [("adamw", "AdamW"), ("adamw8bit", "AdamW"), ("adafactor", "Adafactor"), ("sgd", "SGD")],
)
def test_every_optimizer_trains_on_a_cpu(tmp_path, optimizer, kind):
    job = a_job(tmp_path, "Full", hyperparameters={"optimizer": optimizer, "maxSteps": 2})
    trainer = a_session(job, tmp_path / "scratch").trainer
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == kind


@pytest.mark.parametrize(
    "scheduler",
    ["cosine", "linear", "constant", "constantWithWarmup", "cosineWithRestarts", "polynomial", "inverseSqrt"],
)
def test_every_scheduler_trains(tmp_path, scheduler):
    trainer = a_session(a_job(tmp_path, hyperparameters={"scheduler": scheduler}), tmp_path / "scratch").trainer
    assert trainer.train().global_step == 6


def test_dropout_replaces_every_probability_of_the_configuration(tmp_path):
    job = a_job(tmp_path, "Full", hyperparameters={"dropout": 0.3})
    assert a_session(job, tmp_path / "scratch").trainer.model.model.layers[0].self_attn.attention_dropout == 0.3
    config = GPT2Config()
    override_dropout(config, 0.2)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.2, 0.2, 0.2)


def test_label_smoothing_is_in_the_loss_of_training_but_not_of_evaluation(tmp_path):
    plain = a_session(a_job(tmp_path, lora={"dropout": 0}), tmp_path / "one").trainer
    job = a_job(tmp_path, lora={"dropout": 0}, hyperparameters={"labelSmoothing": 0.5})
    smooth = a_session(job, tmp_path / "two").trainer
    batch = next(iter(plain.get_train_dataloader()))
    assert _loss(smooth, batch) != pytest.approx(_loss(plain, batch), rel=1e-6)
    assert smooth.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_noise_on_embeddings_is_in_training_only(tmp_path):
    job = a_job(tmp_path, "Full", hyperparameters={"neftuneAlpha": 50, "maxSteps": 1})
    noisy = a_session(job, tmp_path / "one").trainer
    still = a_session(a_job(tmp_path, "Full", hyperparameters={"maxSteps": 1}), tmp_path / "two").trainer
    assert noisy.evaluate()["eval_loss"] == pytest.approx(still.evaluate()["eval_loss"])
    assert noisy.train().training_loss != pytest.approx(still.train().training_loss, rel=1e-6)


def test_gradient_checkpointing_changes_no_number(tmp_path):
    losses = []
    for number, on in enumerate([False, True]):
        job = a_job(tmp_path, hyperparameters={"gradientCheckpointing": on}, lora={"dropout": 0})
        losses.append(a_session(job, tmp_path / str(number)).trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_data_workers_change_no_number(tmp_path):
    losses = []
    for workers in (0, 2):
        job = a_job(tmp_path, hyperparameters={"dataWorkers": workers})
        losses.append(a_session(job, tmp_path / str(workers)).trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_the_seed_decides_the_run(tmp_path):
    losses = []
    for number, seed in enumerate([1, 1, 2]):
        job = a_job(tmp_path, hyperparameters={"seed": seed})
        losses.append(a_session(job, tmp_path / str(number)).trainer.train().training_loss)
    assert losses[0] == losses[1] != losses[2]


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    losses = []
    for size, batches in ((4, 1), (1, 4)):
        values = {"perDeviceBatchSize": size, "gradientAccumulationSteps": batches}
        job = a_job(tmp_path, "Full", hyperparameters=values)
        losses.append(a_session(job, tmp_path / str(size)).trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _loss(trainer, batch) -> float:
    trainer.model.train()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(40)).item()
