"""The estimate against what was measured on real GPUs, by others.

Llama-3.1-8B whole, AdamW in float32, FSDP2, bfloat16 passes, on H100s of 96 GB: torchtitan's benchmark of December 2024
(github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md), tables 1 to 3. It reports the memory that
the allocator has reserved, which is what the estimate says that a GPU needs. Its loss has all logits at once, and its
"selective" recomputation keeps attention and every second product of matrices; both are done here as they are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from finetune_api.run import Sharding
from finetune_trainer.estimate import step
from finetune_trainer.estimate.estimate import Estimator
from finetune_trainer.estimate.figures import Memory
from finetune_trainer.estimate.sketch import Sketch
from tests.estimate.jobs import of

LLAMA = Path(__file__).parents[2] / "examples/multi-node/llama-3.1-8b"
pytestmark = pytest.mark.slow


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Memory]:
    """The estimate with torchtitan's loss, and with its selective recomputation or with whole blocks recomputed."""

    def estimate(gpus: int, rows: int, length: int, *, selective: bool) -> Memory:
        monkeypatch.setattr(step, "_loss", loss_over_all_logits)
        if selective:
            monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", keep_some)
        values = {"perDeviceBatchSize": rows, "maxLength": length, "gradientCheckpointing": True}
        job = of("Full", hyperparameters=values)
        return Estimator(lambda: Sketch.of(job.spec, LLAMA, torch.bfloat16)).of(gpus, Sharding.FSDP).memory

    return estimate


def loss_over_all_logits(sketch: Sketch) -> torch.Tensor:
    ids = step._inputs(sketch)["input_ids"]
    return sketch.model(input_ids=ids, labels=ids, use_cache=False).loss


def keep_some(
    model: PreTrainedModel, settings: dict[str, Any], every: Any = PreTrainedModel.gradient_checkpointing_enable
) -> None:
    every(model, {**settings, "context_fn": contexts})


def contexts() -> Any:
    products: defaultdict[bool, int] = defaultdict(int)

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operation is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            if products[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        attends = "scaled_dot_product" in str(operation)
        return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize(("gpus", "measured"), [(8, (82.4, 77.0)), (128, (67.0, 62.0))])
def test_selective_recomputation_takes_what_was_measured_without_and_with_compilation(
    estimated: Callable[..., Memory], gpus: int, measured: tuple[float, float]
) -> None:
    needs = estimated(gpus, rows=2, length=8192, selective=True).needs / 2**30
    assert needs == pytest.approx(measured[0], rel=0.1)
    assert needs == pytest.approx(measured[1], rel=0.1)


def test_whole_recomputation_of_long_rows_takes_what_was_measured(estimated: Callable[..., Memory]) -> None:
    assert estimated(8, rows=1, length=32768, selective=False).needs / 2**30 == pytest.approx(83.9, rel=0.1)
