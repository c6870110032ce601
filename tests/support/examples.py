"""The examples made small: the same jobs over inputs of the same names, on models of some thousand parameters."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from finetune_api.contract import Result
from finetune_api.strategy import StrategyType
from tests.support.jobs import rows_of, write_rows
from tests.support.models import save_tiny_bert, save_tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"
STORES = ("s3://models/", "s3://datasets/")
"""Whatever an example reads or writes lies below one of these."""
STEPS = 12
"""As many as show that a job runs; what the examples say of checkpoints and stages falls within them."""
DIGITS_EACH = 8
PLANNED = "eight nodes of eight H100s; plan and memory are checked by tests/estimate/test_multi_node_examples.py"
ON_GPUS = {"multi-node/llama-3.1-8b.yaml": PLANNED, "multi-node/llama-3.1-70b.yaml": PLANNED}
"""Examples that no small machine runs, and why that is no loss."""
SMALL = sorted(
    name
    for name in (path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("**/*.yaml"))
    if name not in ON_GPUS
)
"""All others."""
ADAPTERS = (
    StrategyType.LORA, StrategyType.QLORA, StrategyType.ADAPTER, StrategyType.PROMPT_TUNING,
    StrategyType.PREFIX_TUNING, StrategyType.IA3,
)  # fmt: skip
"""Those that deliver an adapter; all others deliver a whole model."""


def documents(name: str) -> list[dict[str, Any]]:
    """The jobs of an example, first to last."""
    return list(yaml.safe_load_all((EXAMPLES / name).read_text("utf-8")))


def write_inputs(root: Path) -> Path:
    """Write all that the examples read as root/models/... and root/datasets/..., as in STORES.

    The language model has as many blocks as the examples speak of; the digits and their models are the examples' own.
    """
    models, datasets = root / "models", root / "datasets"
    save_tiny_llama(models / "smollm2-135m-instruct", num_hidden_layers=12)
    save_tiny_bert(models / "minilm-l6")
    for part in ("train", "validation"):
        write_rows(datasets / f"python-docs/{part}.jsonl", [*rows_of("Instruction")] * 4)
    for file, task in {
        "python-docs/topics.jsonl": "CausalLM",
        "stdlib-areas/rows.jsonl": "SequenceClassification",
        "function-lengths/rows.jsonl": "Regression",
    }.items():
        write_rows(datasets / file, [*rows_of(task)] * 4)
    _write_digits(root)
    return root


def _write_digits(root: Path) -> None:
    folder = EXAMPLES / "image-classification"
    for model in runpy.run_path(str(folder / "model.py"))["write"](root / "digits-models").iterdir():
        model.rename(root / f"models/digits-{model.name}")
    images = runpy.run_path(str(folder / "data.py"))["write"](root / "all-digits")
    for digit in images.glob("*/*"):
        target = root / "datasets/digits" / digit.relative_to(images)
        target.mkdir(parents=True)
        for image in sorted(digit.iterdir())[:DIGITS_EACH]:
            shutil.copy(image, target)
    shutil.rmtree(images)
    (root / "digits-models").rmdir()


def made_small(document: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The same job over what lies under root, an address, and for a few steps; nothing else is changed."""
    text = yaml.safe_dump(dict(document))
    for store in STORES:
        text = text.replace(store, f"{root}/{store.removeprefix('s3://')}")
    wire: dict[str, Any] = yaml.safe_load(text)
    settings = wire["spec"]["hyperparameters"]
    settings["maxSteps"] = min(settings.get("maxSteps", STEPS), STEPS)
    return wire


def check_delivery(wire: Mapping[str, Any], result: Result, folder: Path) -> None:
    """What the job has delivered into its output is of the kind that its strategy promises, and loads.

    Args:
        folder: a copy of the output's folder.
    """
    spec = wire["spec"]
    kind = "adapter" if spec["strategy"]["type"] in ADAPTERS else "model"
    assert (result.output.kind, result.output.uri) == (kind, f"{spec['output']['uri']}/{kind}")
    assert 0 < result.steps <= spec["hyperparameters"]["maxSteps"]
    parts = {kind, "model"} if spec["output"].get("merge") else {kind}
    for part in parts:
        files = list((folder / part).glob("*.safetensors"))
        assert files
        assert all(load_file(file) for file in files)
        assert (folder / part / ("adapter_config.json" if part == "adapter" else "config.json")).is_file()
