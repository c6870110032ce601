"""Every example that trains SmolLM2 runs as it stands, on a tiny model in its place; one for each strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob, StrategyType
from tests.support.jobs import rows_of, run, write_rows
from tests.support.models import save_tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"
SINGLE = sorted(path for path in EXAMPLES.glob("*.yaml") if path.name != "chain.yaml")
"""The chain, which takes an operator, is run with its like in tests/local."""
BASE, DATA, OUT = "s3://models/smollm2-135m-instruct", "s3://datasets/python-docs/", "s3://models/out/"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def here(document: dict[str, Any], root: Path) -> FineTuneJob:
    """The same job on small inputs under root: a Llama of as many blocks as the examples speak of, and a few rows."""
    spec = document["spec"]
    assert spec["model"]["uri"] == BASE
    assert spec["dataset"]["uri"].startswith(DATA)
    assert spec["output"]["uri"].startswith(OUT)
    model = save_tiny_llama(root / "model", num_hidden_layers=12)
    rows = write_rows(root / "rows.jsonl", [*rows_of(spec["task"]["type"])] * 4)
    spec["model"]["uri"], spec["dataset"]["uri"] = f"file://{model}", f"file://{rows}"
    spec["output"]["uri"] = f"file://{root / 'out'}"
    # As many steps as show that it runs; what the example says of checkpoints and stages falls within them.
    spec["hyperparameters"]["maxSteps"] = 12
    return resolve(FineTuneJob.from_wire({**document, "metadata": {**document["metadata"], "uid": "uid"}}))


@pytest.mark.parametrize("path", SINGLE, ids=lambda path: path.stem)
def test_an_example_trains_and_delivers(tmp_path: Path, path: Path) -> None:
    (document,) = documents(path)
    job = here(document, tmp_path)
    result = run(job, tmp_path / "scratch")
    assert result.steps > 0
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] or job.spec.strategy.type in SLOW_STARTERS
    files = list((tmp_path / "out" / result.output.kind).glob("*.safetensors"))
    assert files
    assert all(load_file(file) for file in files)
    if job.spec.output.merge:
        assert (tmp_path / "out/model/config.json").is_file()


SLOW_STARTERS = (StrategyType.PROMPT_TUNING, StrategyType.PREFIX_TUNING, StrategyType.FULL)
"""At the rates that suit a trained model a random one has hardly moved after twelve steps."""


def test_there_is_an_example_for_every_strategy() -> None:
    shown = {document["spec"]["strategy"]["type"] for path in SINGLE for document in documents(path)}
    assert shown == {strategy.value for strategy in StrategyType}


def test_the_table_of_examples_names_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    assert [path.name for path in EXAMPLES.glob("*.yaml") if f"`{path.name}`" not in text] == []
