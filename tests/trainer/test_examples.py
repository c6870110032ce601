"""Every example that trains SmolLM2 runs as it stands, on a tiny model in its place; one for each strategy."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob, StrategyType
from tests.support.examples import EXAMPLES, ON_GPUS, SMALL, STORES, check_delivery, documents, made_small, write_inputs
from tests.support.jobs import run

SINGLE = [name for name in SMALL if "/" not in name and name != "chain.yaml"]
"""The chain, which takes an operator, is run with its like in tests/local, and with all others in tests/e2e."""
SLOW_STARTERS = (StrategyType.PROMPT_TUNING, StrategyType.PREFIX_TUNING, StrategyType.FULL)
"""At the rates that suit a trained model a random one has hardly moved after twelve steps."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("name", SINGLE)
def test_an_example_trains_and_delivers(inputs: Path, tmp_path: Path, name: str) -> None:
    (document,) = documents(name)
    wire = made_small(document, f"file://{inputs}")
    job = resolve(FineTuneJob.from_wire({**wire, "metadata": {**wire["metadata"], "uid": "uid"}}))
    result = run(job, tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] or job.spec.strategy.type in SLOW_STARTERS
    check_delivery(wire, result, Path(job.spec.output.uri.removeprefix("file://")))


def test_there_is_an_example_for_every_strategy() -> None:
    shown = {document["spec"]["strategy"]["type"] for name in SINGLE for document in documents(name)}
    assert shown == {strategy.value for strategy in StrategyType}


def test_the_table_of_examples_names_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    assert [path.name for path in EXAMPLES.glob("*.yaml") if f"`{path.name}`" not in text] == []


def test_what_cannot_run_small_asks_for_gpus_and_nothing_else_does() -> None:
    asking = {
        path.relative_to(EXAMPLES).as_posix()
        for path in EXAMPLES.glob("**/*.yaml")
        for document in documents(path.relative_to(EXAMPLES).as_posix())
        if document["spec"].get("resources", {}).get("gpusPerNode")
    }
    assert asking == set(ON_GPUS)


@pytest.mark.parametrize("name", SMALL)
def test_all_that_an_example_reads_is_there_or_comes_from_another_example(inputs: Path, name: str) -> None:
    written = {document["spec"]["output"]["uri"] for name in SMALL for document in documents(name)}
    for document in documents(name):
        spec = document["spec"]
        validation = spec["dataset"].get("validation", {})
        for uri in filter(None, (spec["model"]["uri"], spec["dataset"]["uri"], validation.get("uri"))):
            comes = uri.startswith("job://") or uri.removesuffix("/model") in written
            assert comes or (uri.startswith(STORES) and (inputs / uri.removeprefix("s3://")).exists())


def test_jobs_of_all_examples_can_be_in_one_namespace() -> None:
    jobs = [document for name in SMALL for document in documents(name)]
    for names in ([job["metadata"]["name"] for job in jobs], [job["spec"]["output"]["uri"] for job in jobs]):
        assert len(set(names)) == len(names)
