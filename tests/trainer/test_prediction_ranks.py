"""Predictions of several ranks are measured together, each held-out row once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing import spawn

from finetune_api.job import FineTuneJob
from tests.support.jobs import a_job, a_session, rows_of, write_rows
from tests.support.models import save_tiny_bert

RANKS = 2
HELD_OUT = 11
"""Neither whole batches of 2 nor the same for both ranks: what fills the last batch must not count."""


def evaluate(rank: int, job: FineTuneJob, root: Path) -> None:
    """What one rank measures, written to a file of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=RANKS)
    trainer = a_session(job, root / f"rank-{rank}").trainer
    assert trainer.accelerator.num_processes == RANKS
    metrics = trainer.evaluate()
    (root / f"{rank}.json").write_text(json.dumps({"metrics": metrics, "details": trainer.details}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    save_tiny_bert(tmp_path / "model")
    data = write_rows(tmp_path / "held-out.jsonl", list(rows_of("SequenceClassification"))[:HELD_OUT])
    held_out = {"validation": {"uri": f"file://{data}"}}
    job = a_job(tmp_path, "Full", "SequenceClassification", dataset=held_out, hyperparameters={"evalBatchSize": 2})
    alone = a_session(job, tmp_path / "alone").trainer
    expected = alone.evaluate()
    spawn(evaluate, (job, tmp_path), nprocs=RANKS)
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in ("eval_loss", "eval_accuracy", "eval_f1"):
            assert found["metrics"][name] == pytest.approx(expected[name], rel=1e-6)
        assert found["details"] == alone.details
        assert sum(map(sum, found["details"]["confusion"]["counts"])) == HELD_OUT
