"""Jobs whose memory is asked for; nothing of them has to exist."""

from __future__ import annotations

from typing import Any

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob


def of(strategy: str = "Full", /, *, task: str = "CausalLM", **parts: Any) -> FineTuneJob:
    """A resolved job; `parts` are fields of its spec's parts, in the names of the YAML."""
    wire: dict[str, Any] = {
        "task": {"type": task},
        "model": {"uri": "s3://models/base"},
        "dataset": {"uri": "s3://data/rows"},
        "strategy": {"type": strategy},
        "output": {"uri": "s3://out/tuned"},
    }
    for part, fields in parts.items():
        wire[part] = wire.get(part, {}) | fields
    return resolve(FineTuneJob.from_wire({"metadata": {"name": "asked"}, "spec": wire}))
