"""Two processes that train a small model for real, and count the bytes of all tensors that are alive.

Usage: ranks.py FOLDER; FOLDER/model holds config.json. Rank 0 writes FOLDER/counted.json: by case of CASES the most
bytes in the second step.
"""

from __future__ import annotations

import json
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.estimate.sketch import Sketch
from tests.estimate.jobs import of
from tests.support.torchrun import leave

RANKS, ROWS, LENGTH = 2, 4, 192
CASES: dict[str, dict[str, Any]] = {
    "Full, replicated": {"strategy": "Full"},
    "Full, replicated, recomputing": {"strategy": "Full", "recompute": True},
    "Full, replicated, bfloat16, accumulating": {"strategy": "Full", "dtype": "bfloat16", "steps": 2},
    "Full, sharded": {"strategy": "Full", "sharded": True},
    "Full, sharded, recomputing, bfloat16": {
        "strategy": "Full", "sharded": True, "recompute": True, "dtype": "bfloat16",
    },
    "LoRA, replicated, bfloat16": {"strategy": "LoRA", "dtype": "bfloat16"},
    "LoRA, sharded, recomputing": {"strategy": "LoRA", "sharded": True, "recompute": True},
}  # fmt: skip


class Recount(TorchDispatchMode):
    """Adds up all storages that are alive after every operation: FSDP empties those that it frees, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.highest = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        self.highest = max(self.highest, self.now())
        return made

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's bytes for as long as it is alive."""
        # What wraps a shard claims the whole tensor's bytes.
        held = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = held.untyped_storage()
        self._storages[id(storage)] = weakref.ref(storage)

    def now(self) -> int:
        """Bytes of all that is alive."""
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values() if storage.device.type != "meta")


def job_of(case: dict[str, Any]) -> Any:
    """The job that a case means."""
    return of(
        case["strategy"],
        model={"dtype": case.get("dtype", "float32")},
        hyperparameters={
            "perDeviceBatchSize": ROWS,
            "maxLength": LENGTH,
            "gradientAccumulationSteps": case.get("steps", 1),
            "gradientCheckpointing": case.get("recompute", False),
        },
    )


def counted(case: dict[str, Any], folder: Path) -> int:
    """The most bytes of all tensors in the second step, when the optimizer has its moments."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    meter = Recount()
    with meter:
        model = built(case, folder, dtype)
        ids = torch.randint(0, 1000, (ROWS, LENGTH))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=False, foreach=False)
        for _ in range(2):
            meter.highest = 0
            for _ in range(case.get("steps", 1)):
                half = dtype is not torch.float32
                with torch.autocast("cpu", dtype) if half else nullcontext():
                    mask = torch.ones_like(ids)
                    found = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs
                (-found.sum()).backward()
            highest = meter.highest
            optimizer.step()
            optimizer.zero_grad()
    return highest


def built(case: dict[str, Any], folder: Path, dtype: torch.dtype) -> Any:
    """The model as the strategy prepares it, with numbers, over all ranks."""
    job = job_of(case)
    sketch = Sketch.of(job.spec, folder, dtype)
    config = AutoConfig.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_config(config)
    if isinstance(sketch.model, PeftModel):
        from finetune_trainer.loaded import Loaded
        from finetune_trainer.strategies import strategy_of

        model = strategy_of(job.spec.strategy).prepare(Loaded(model.to(dtype), peft_task="CAUSAL_LM"))
    if case.get("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.disable_input_require_grads()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    if not case.get("sharded"):
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    found = {name: counted(case, target / "model") for name, case in CASES.items()}
    if dist.get_rank() == 0:
        (target / "counted.json").write_text(json.dumps(found))
    leave()
