"""Locked memory, which InfiniBand needs."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from finetune_api.job import FineTuneJob
from finetune_trainer.fabric import locked_memory_warning
from tests.launch.conftest import JOB


@pytest.mark.parametrize(
    ("preset", "limit", "capabilities", "warns"),
    [
        ("InfiniBand", 8 * 2**20, "0", True),
        ("InfiniBand", resource.RLIM_INFINITY, "0", False),
        ("InfiniBand", 8 * 2**20, f"{1 << 14:016x}", False),
        ("EFA", 8 * 2**20, "0", False),
    ],
)
def test_a_pod_that_may_not_lock_memory_for_infiniband_says_so(
    preset: str, limit: int, capabilities: str, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tpython\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    resources = {"nodes": 2, "gpusPerNode": 8, "network": {"preset": preset}}
    job = FineTuneJob.from_wire({**JOB, "spec": {**JOB["spec"], "output": {"uri": "s3://b/o"}, "resources": resources}})
    found = locked_memory_warning(job.spec, status)
    assert (found is not None) == warns
    assert not warns or "8192 KiB" in str(found)
