"""examples/image-classification, from random weights to other digits, far above the majority."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune_api.contract import Result
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from tests.support.jobs import run

EXAMPLE = Path(__file__).parents[2] / "examples/image-classification"


def run_example(name: str, root: Path) -> Result:
    """A job of the example, its buckets being folders under root."""
    job = yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text().replace("s3://", f"file://{root}/"))
    job["metadata"]["uid"] = name
    return run(resolve(FineTuneJob.from_wire(job)), root / "scratch" / name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "accuracy"), [("vit", 0.8), ("resnet", 0.95)])
def test_a_model_that_knows_some_digits_learns_others_by_its_last_block(tmp_path, model, accuracy):
    runpy.run_path(str(EXAMPLE / "data.py"))["write"](tmp_path / "datasets/digits")
    folders = runpy.run_path(str(EXAMPLE / "model.py"))["write"](tmp_path / "untrained")
    (tmp_path / "models").mkdir()
    (folders / model).rename(tmp_path / f"models/digits-{model}")

    base = run_example(f"{model}-base", tmp_path)
    assert base.baseline["eval_accuracy"] < 0.25
    assert base.metrics["eval_accuracy"] > 0.95

    tuned = run_example(model, tmp_path)
    assert tuned.baseline["eval_accuracy"] < 0.25
    assert tuned.metrics["eval_accuracy"] > accuracy
    assert tuned.trainable_parameters < tuned.total_parameters

    before, after = (
        load_file(tmp_path / f"models/out/digits-{model}{side}/model/model.safetensors") for side in ("-base", "")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    # Embedding, earlier blocks and their running statistics: bit by bit as they were.
    assert sum(before[name].numel() for name in same) >= tuned.total_parameters - tuned.trainable_parameters
    assert not any("classifier" in name for name in same)
