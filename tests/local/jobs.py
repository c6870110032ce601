"""Jobs for tests of the local adaptor, without S3: everything lies in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STUB = ("-m", "tests.support.stub_trainer")


def fine_tune_job(folder: Path, *, steps: int = 10, seed: int = 42, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tune", "namespace": "default"},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": f"file://{folder}/model"},
            "dataset": {"uri": f"file://{folder}/data.jsonl"},
            "strategy": {"type": "LoRA"},
            "hyperparameters": {"maxSteps": steps, "seed": seed},
            "output": {"uri": f"file://{folder}/out"},
            "runPolicy": {"terminationGracePeriodSeconds": 30},
            **spec,
        },
    }
