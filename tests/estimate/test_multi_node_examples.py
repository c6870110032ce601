"""The large jobs in examples/multi-node: valid, rendered for their GPUs, and simulated to fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from finetune_api.contract import ANNOTATION_NODES
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_api.run import Sharding
from finetune_operator.plan import plan
from finetune_operator.settings import Settings
from finetune_operator.validation import admit
from finetune_trainer.estimate.simulation import simulate

FOLDER = Path(__file__).parents[2] / "examples/multi-node"
NAMES = ("llama-3.1-8b", "llama-3.1-70b")
PARAMETERS = {"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}
"""As the models' cards have them: 8.03B and 70.6B."""


def job(name: str) -> FineTuneJob:
    return FineTuneJob.from_wire(admit(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_becomes_eight_pods_with_eight_gpus_and_is_checked_first(name: str) -> None:
    manifests = plan(job(name), Settings())
    spec = manifests.workload["spec"]
    (trainer,) = spec["template"]["spec"]["containers"]
    nodes = spec["template"]["metadata"]["annotations"][ANNOTATION_NODES]
    environment = {item["name"]: item.get("value") for item in trainer["env"]}
    assert (spec["completions"], trainer["resources"]["limits"]["nvidia.com/gpu"]) == (8, "8")
    assert (nodes, environment["PET_NPROC_PER_NODE"]) == ("8", "8")
    assert spec["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert manifests.preflight is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_sharded_and_would_not_fit_replicated(name: str) -> None:
    found = simulate(resolve(job(name)), FOLDER / name, [8, 1024])
    own, few, many = found.estimates
    assert [estimate.sharding for estimate in found.estimates] == [Sharding.FSDP] * 3
    assert found.gpu_memory is not None
    assert own.memory.needs < found.gpu_memory
    assert (found.advice, found.rows_per_step) == ("", [128, 16, 2048])
    # All of them learn: 4 bytes, and as many again for each moment; shards of 64 have at most a row more than a share.
    assert own.checkpoint.total == 12 * PARAMETERS[name]
    assert own.memory.parameters == pytest.approx(4 * PARAMETERS[name] / 64, rel=1e-3)
    assert few.memory.parameters > own.memory.parameters > many.memory.parameters
    assert (few.memory.needs > found.gpu_memory) == (name == "llama-3.1-70b")


@pytest.mark.parametrize("name", NAMES)
def test_the_configurations_are_what_was_published(name: str) -> None:
    config = json.loads((FOLDER / name / "config.json").read_text())
    sizes = {"llama-3.1-8b": (32, 4096, 14336, 32), "llama-3.1-70b": (80, 8192, 28672, 64)}[name]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert tuple(config[field] for field in names) == sizes
