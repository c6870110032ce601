"""Two processes that write models in shards, and what the library writes of the same ones whole; see test_export_ranks.

Usage: export_ranks.py FOLDER. Rank 0 writes FOLDER/<case>/{shards,whole} and FOLDER/found.json: by case the most bytes
of tensors that it held above what it had before, those of the largest tensor, and of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from finetune_trainer.consolidation import LARGEST_FILE, save_shards
from finetune_trainer.strategies.base import save_model
from finetune_trainer.structure import Structure
from tests.estimate.ranks import Recount
from tests.support.architectures import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_resnet, tiny_vit
from tests.support.torchrun import leave

RANKS = 2
MANY = 24
"""Blocks of the model whose memory is counted."""
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "Llama": (tiny_llama, {}),
    "Llama, tied, bfloat16": (lambda: tiny_llama(tie_word_embeddings=True), {"dtype": torch.bfloat16}),
    "Llama, many blocks, small files": (lambda: tiny_llama(num_hidden_layers=MANY), {"largest": "200KB"}),
    "Mixtral, small files": (tiny_mixtral, {"largest": "50KB"}),
    "GPT-2": (tiny_gpt2, {}),
    "ViT": (tiny_vit, {}),
    "ResNet, float16": (tiny_resnet, {"dtype": torch.float16}),
}


def counted(name: str, folder: Path) -> dict[str, int]:
    """Write one model in both ways; it is loaded as the trainer does, since the library remembers where from."""
    build, options = CASES[name]
    dtype, largest = options.get("dtype", torch.float32), options.get("largest", LARGEST_FILE)
    main = dist.get_rank() == 0
    if main:
        build().save_pretrained(folder / "base")
        whole = build().from_pretrained(folder / "base")
        save_model(whole, folder / "cast", dtype)
        whole.save_pretrained(folder / "whole", max_shard_size=largest)
        (folder / "shards").mkdir()
    dist.barrier()
    with Recount() as meter:
        model = build().from_pretrained(folder / "base")
        tensors = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
        for block in Structure.of(model).blocks:
            fully_shard(model.get_submodule(block.name))
        fully_shard(model, reshard_after_forward=False)
        before = meter.now()
        meter.highest = 0
        save_shards(model, dtype, folder / "shards" if main else None, lambda: None, largest)
    return {"above": meter.highest - before, "largest": max(tensors), "all": sum(tensors)}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    dist.init_process_group("gloo")
    found = {name: counted(name, target / name) for name in CASES}
    if dist.get_rank() == 0:
        (target / "found.json").write_text(json.dumps(found))
    leave()
