"""Masked gradients among several ranks: exchanged masked, so that all ranks go on with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from finetune_api.strategy import StrategySpec
from finetune_trainer.fisher import unpacked
from finetune_trainer.loaded import Loaded
from finetune_trainer.strategies import strategy_of
from tests.support.architectures import VOCABULARY, tiny_llama
from tests.support.models import state_of

RANKS = 2


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one."""
    ids = torch.randint(4, VOCABULARY, (count, 1, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.slow
def test_ranks_agree_on_what_is_kept_with_accumulation_and_recomputation(tmp_path):
    spawn(train, (f"file://{tmp_path}/meeting",), nprocs=RANKS)


def train(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    select = {"modules": ["Attention"], "fisher": {"fraction": 0.2, "samples": 4}}
    strategy = strategy_of(StrategySpec.from_wire({"type": "Partial", "select": select}))
    model = strategy.prepare(Loaded(tiny_llama(), examples=rows))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = state_of(model.train())
    steps(DistributedDataParallel(model), rank)
    after = state_of(model)
    for name, bits in strategy.choice().items():
        assert torch.equal(before[name] != after[name], unpacked(bits, before[name].shape)), name
    weights = torch.cat([tensor.flatten() for tensor in after.values()])
    everywhere = [torch.zeros_like(weights) for _ in range(RANKS)]
    dist.all_gather(everywhere, weights)
    assert torch.equal(*everywhere)
    dist.destroy_process_group()


def steps(model: DistributedDataParallel, rank: int) -> None:
    """Two steps of two micro-steps, each rank on rows of its own."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0)
    own = rows(8)[rank::RANKS]
    for step in range(2):
        with model.no_sync():
            model(**own[2 * step]).loss.backward()
        model(**own[2 * step + 1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
