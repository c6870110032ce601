"""Defaults that no schema can say: what follows from the strategy, the task, the data and the hardware."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.pairs import ALLOWED
from finetune_api.strategy import StrategyType
from finetune_api.task import SUPERVISED, TaskType
from finetune_operator.validation import admit, validate
from tests.api.jobs import FULLS, changed, job_of, minimal
from tests.api.sensible import Object

LORA = {
    **{"rank": 16, "alpha": 32, "dropout": 0.05, "targetModules": ["all-linear"], "modulesToSave": []},
    **{"rankPattern": {}, "rsLoRA": False, "doRA": False},
}
STRATEGIES: dict[str, tuple[float, Object]] = {
    "Full": (2e-5, {}),
    "Partial": (5e-5, {"select": {"layers": {"last": 1}}}),
    "LoRA": (2e-4, {"lora": LORA}),
    "QLoRA": (2e-4, {"lora": LORA, "quantization": {"type": "nf4", "doubleQuant": True}}),
    "Adapter": (
        5e-4,
        {
            "adapter": {
                **{"placement": "Houlsby", "size": 64, "activation": "relu", "dropout": 0.0, "layerNorms": True},
            }
        },
    ),
    "PromptTuning": (3e-2, {"promptTuning": {"tokens": 20, "encoder": "None"}}),
    "PrefixTuning": (1e-2, {"prefixTuning": {"tokens": 20, "projection": False}}),
    "IA3": (5e-3, {"ia3": {"targetModules": []}}),
    "LayerNorm": (1e-3, {}),
    "Additive": (2e-4, {"additive": {"blocks": 2, "placement": "Interleaved", "head": False}}),
    "Green": (5e-5, {"green": {"target": 0.5, "everySteps": 100}}),
}
"""Strategies: the learning rate, and the options that are filled in."""
METRICS = {
    "Instruction": ["perplexity"],
    "CausalLM": ["perplexity"],
    "SequenceClassification": ["accuracy", "precision", "recall", "f1"],
    "Regression": ["mse", "mae", "r2"],
    "ImageClassification": ["accuracy", "precision", "recall", "f1"],
}
TEXT = {"spec.task.type": "CausalLM"}
IMAGE = {"spec.task.type": "ImageClassification"}
A_GPU = {"spec.resources.gpusPerNode": 1}
HELD_OUT = {"spec.dataset.validation": {"fraction": 0.1}}


def of(strategy: str, changes: dict[str, Any] | None = None) -> Object:
    return changed(job_of(StrategyType(strategy), TaskType.INSTRUCTION), changes or {})


def resolved(job: Object) -> FineTuneJobSpec:
    return resolve(FineTuneJob.from_wire(admit(job))).spec


@pytest.mark.parametrize("strategy", StrategyType)
def test_every_strategy_has_its_rate_and_its_options(strategy: StrategyType) -> None:
    rate, options = STRATEGIES[strategy.value]
    spec = resolved(of(strategy.value))
    assert spec.hyperparameters.learning_rate == rate
    assert spec.strategy.to_wire() == {"type": strategy.value, **options}


@pytest.mark.parametrize("strategy", StrategyType)
def test_what_is_given_is_kept(strategy: StrategyType) -> None:
    given = next(job for name, job in FULLS.items() if name.startswith(f"{strategy.value} of "))
    spec = resolved(given)
    assert spec.hyperparameters.learning_rate == 0.0001
    assert spec.strategy.to_wire() == given["spec"]["strategy"]
    assert spec.evaluation.to_wire()["metrics"] == given["spec"]["evaluation"]["metrics"]
    assert spec.output.to_wire()["weights"] == "Last"


@pytest.mark.parametrize(
    ("resources", "processes"),
    [({}, 1), ({"gpusPerNode": 8}, 8), ({"processesPerNode": 4}, 4), ({"nodes": 2, "gpusPerNode": 1}, 1)],
)
def test_every_gpu_has_a_process_and_a_pod_without_has_one(resources: dict[str, int], processes: int) -> None:
    assert resolved(changed(minimal(), {"spec.resources": resources})).resources.processes_per_node == processes


def test_options_of_shards_are_filled_in_unless_there_can_be_none() -> None:
    assert resolved(minimal()).distributed.to_wire()["fsdp"] == {"reshardAfterForward": True, "cpuOffload": False}
    assert resolved(changed(minimal(), {"spec.distributed.sharding": "DDP"})).distributed.fsdp is None


@pytest.mark.parametrize("task", SUPERVISED)
def test_every_task_is_measured_by_all_it_has_and_only_language_is_sampled(task: TaskType) -> None:
    spec = resolved(changed(minimal(), {"spec.task.type": task.value}))
    assert spec.evaluation.to_wire()["metrics"] == METRICS[task.value]
    assert spec.evaluation.samples == (3 if task.value in ("Instruction", "CausalLM") else 0)


@pytest.mark.parametrize(
    ("job", "packs"),
    [
        pytest.param(of("LoRA", TEXT), True, id="plain text is packed"),
        pytest.param(of("LoRA"), False, id="instructions are not"),
        pytest.param(of("LoRA", {"spec.hyperparameters.packing": True}), True, id="unless one says so"),
        pytest.param(of("LoRA", {**TEXT, "spec.hyperparameters.packing": False}), False, id="nor is text then"),
        pytest.param(of("PromptTuning", TEXT), False, id="virtual tokens stand before the first row only"),
        pytest.param(of("PrefixTuning", TEXT), False, id="and so do prefixes"),
        pytest.param(of("LoRA", {**TEXT, "spec.hyperparameters.maxLength": 15}), False, id="packs would be too short"),
        pytest.param(of("LoRA", {**TEXT, "spec.hyperparameters.maxLength": 16}), True, id="and here long enough"),
        pytest.param(
            of("LoRA", {**TEXT, "spec.dataset.streaming": True, "spec.hyperparameters.maxSteps": 9}),
            False,
            id="streams are not packed",
        ),
        pytest.param(of("LoRA", {"spec.task.type": "Regression"}), False, id="numbers are answers to rows"),
    ],
)
def test_rows_are_packed_where_nothing_is_lost(job: Object, packs: bool) -> None:
    assert resolved(job).hyperparameters.packing is packs


@pytest.mark.parametrize(
    ("job", "recomputes"),
    [
        pytest.param(of("Full", A_GPU), True, id="on GPUs memory is what is short"),
        pytest.param(of("Full"), False, id="on CPUs time is"),
        pytest.param(of("PromptTuning", A_GPU), True, id="virtual tokens can be computed again"),
        pytest.param(of("PrefixTuning", A_GPU), False, id="prefixes cannot"),
        pytest.param(of("Full", {**IMAGE, **A_GPU}), False, id="of image models only some can"),
        pytest.param(
            of("Full", {**IMAGE, **A_GPU, "spec.hyperparameters.gradientCheckpointing": True}), True, id="as is known"
        ),
        pytest.param(
            of("Full", {**A_GPU, "spec.hyperparameters.gradientCheckpointing": False}), False, id="unless one has room"
        ),
    ],
)
def test_activations_are_computed_again_where_that_helps_and_works(job: Object, recomputes: bool) -> None:
    assert resolved(job).hyperparameters.gradient_checkpointing is recomputes


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        pytest.param({}, "Last", id="nothing is known of the others"),
        pytest.param(HELD_OUT, "Last", id="before and after are no steps"),
        pytest.param({**HELD_OUT, "spec.evaluation.everySteps": 5}, "Best", id="one of the steps was the best"),
        pytest.param(
            {**HELD_OUT, "spec.evaluation.everySteps": 5, "spec.output.weights": "Last"},
            "Last",
            id="unless one says so",
        ),
    ],
)
def test_the_best_step_is_delivered_where_it_is_known(changes: dict[str, Any], weights: str) -> None:
    assert resolved(of("LoRA", changes)).output.to_wire()["weights"] == weights


def test_a_stage_adds_one_block_unless_stages_are_named() -> None:
    one = resolved(of("Full", {"spec.strategy.unfreezing": {"everySteps": 5}})).strategy.unfreezing
    assert one is not None
    assert one.layers_per_stage == 1
    named = resolved(FULLS["stages by epochs"]).strategy.unfreezing
    assert named is not None
    assert named.layers_per_stage is None


def test_evaluation_has_the_batch_of_training_and_buckets_of_an_endpoint_lie_in_its_path() -> None:
    spec = resolved(of("LoRA", {"spec.hyperparameters.perDeviceBatchSize": 7}))
    assert spec.hyperparameters.eval_batch_size == 7
    assert spec.storage.s3.path_style is False
    assert resolved(of("LoRA", {"spec.storage.s3.endpoint": "http://minio:9000"})).storage.s3.path_style is True


@pytest.mark.parametrize(("strategy", "task"), ALLOWED)
def test_what_is_resolved_can_be_written_down_and_resolved_again(strategy: StrategyType, task: TaskType) -> None:
    job = FineTuneJob.from_wire(admit(job_of(strategy, task)))
    before = job.to_wire()
    once = resolve(job)
    assert job.to_wire() == before
    assert resolve(once) == once
    assert validate({**once.to_wire(), "metadata": {"name": "small"}}) == []
