"""Two processes choose and learn what one does with the same data, and go on from a checkpoint bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import changed, state_of
from tests.support.torchrun import torchrun
from tests.trainer import green_ranks

pytestmark = pytest.mark.slow
SHARDED = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "activation_checkpointing": True,
    },
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "replicated": ("BERT", {}),
    "sharded": ("Llama with a fused head", SHARDED),
}


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"told-{rank}.json").read_text())


def figures(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in told(folder)["history"] if name in entry]


def loaded(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights-{rank}.pt")


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_choose_and_learn_what_one_does(tmp_path, way):
    model, arguments = WAYS[way]
    alone = {"max_steps": 8, "gradient_accumulation_steps": 2, "activation_checkpointing": way == "sharded"}
    green_ranks.main({"folder": str(tmp_path / "one"), "model": model, "arguments": alone})
    together = {"max_steps": 8, "ddp_backend": "gloo", **arguments}
    torchrun(green_ranks, json.dumps({"folder": str(tmp_path / "two"), "model": model, "arguments": together}))
    one, two = tmp_path / "one/whole", tmp_path / "two/whole"
    assert told(two)["chosen"] == told(one)["chosen"]
    assert told(two, 0) == told(two, 1)
    assert figures(two, "loss") == pytest.approx(figures(one, "loss"), abs=1e-4)
    assert figures(two, "green_share") == pytest.approx(figures(one, "green_share"), rel=1e-9)
    assert len(figures(two, "green_share")) == 3
    for weights in (loaded(two, 0), loaded(two, 1)):
        assert changed(state_of(green_ranks.make(model)), weights) == set(told(one)["chosen"])


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_within_an_interval_to_the_bit(tmp_path, way):
    model, arguments = WAYS[way]
    # Sharded gradients come in the precision of what learned when sharding was set up.
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "bf16": True, "ddp_backend": "gloo"}
    torchrun(green_ranks, json.dumps({"folder": str(tmp_path), "model": model, "arguments": {**saving, **arguments}}))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert told(resumed)["history"] == told(whole)["history"]
    assert len(figures(resumed, "green_share")) == 3
    for rank in (0, 1):
        one, two = loaded(whole, rank), loaded(resumed, rank)
        assert not changed(one, two)
        assert len(one) == len(two) > 20
