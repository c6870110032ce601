"""`finetune run` with the real trainer and the embedded S3 server: the main job on one machine."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from tests.support.models import save_tiny_llama
from tests.support.processes import processes_in, wait_for
from tests.support.shell import Shell

STEPS = 60
START_SECONDS = 180
"""Until training has begun: on a busy machine the imports of torch and transformers take their time."""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A folder with a tiny model, data and a job."""
    save_tiny_llama(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(200)
    ]
    shell = Shell(tmp_path)
    shell.write("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shell.write("job.yaml", yaml.safe_dump(job()))
    return shell


def job() -> dict[str, object]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": "s3://models/tiny"},
            "dataset": {"uri": "s3://data/train.jsonl", "validation": {"fraction": 0.1}},
            "strategy": {"type": "LoRA"},
            "hyperparameters": {"epochs": 10, "maxSteps": STEPS, "learningRate": 1.0e-3, "maxLength": 128},
            "checkpoint": {"everySteps": 20},
            "evaluation": {"samples": 1},
            "output": {"uri": "s3://out/tiny"},
        },
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_suspended_by_ctrl_c_goes_on_and_delivers_an_adapter_that_loads(shell: Shell) -> None:
    uploads = ("--upload", "model=s3://models/tiny", "--upload", "train.jsonl=s3://data/train.jsonl")
    first = shell.start("run", "job.yaml", *uploads, start_new_session=True)
    log = shell.folder / ".finetune" / "pods"
    wait_for(lambda: any("Training" in path.read_text() for path in log.glob("*/log")), START_SECONDS)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: every process of the command gets it
    out, err = first.communicate(timeout=120)
    assert first.returncode == 130, out + err
    assert re.search(r"^tiny +LoRA +Suspended ", out, re.MULTILINE)

    second = shell.run("run", "job.yaml", seconds=300)
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.search(rf"^tiny +LoRA +Succeeded +{STEPS}/{STEPS} ", second.stdout, re.MULTILINE)
    perplexity = re.search(r"^eval_perplexity +([\d.]+) +([\d.]+)$", second.stdout, re.MULTILINE)
    assert perplexity is not None
    assert float(perplexity[2]) < float(perplexity[1])
    wait_for(lambda: not processes_in(shell.folder))

    shell.run("storage", "cp", "s3://out/tiny/adapter/", "adapter/")
    _load(shell.folder)


def chain() -> list[dict[str, object]]:
    """A model that is trained whole, and two jobs that go on from it: by its weights, and by its angles."""
    spec = {**job()["spec"], "hyperparameters": {"maxSteps": 6, "learningRate": 1.0e-3, "maxLength": 128}}  # type: ignore[dict-item]
    own: dict[str, dict[str, object]] = {
        "lora": {"model": {"uri": "job://first"}},
        "partial": {
            "strategy": {"type": "Partial", "select": {"angle": {"from": "job://first", "topK": 1}}},
        },
        "first": {"strategy": {"type": "Full"}},
    }
    named = {name: {**spec, "output": {"uri": f"s3://out/{name}"}, **changes} for name, changes in own.items()}
    return [{**job(), "metadata": {"name": name}, "spec": spec} for name, spec in named.items()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_trains_on_from_the_model_and_from_the_angles_of_its_first_job(shell: Shell) -> None:
    shell.write("chain.yaml", yaml.safe_dump_all(chain()))
    uploads = ("--upload", "model=s3://models/tiny", "--upload", "train.jsonl=s3://data/train.jsonl")
    done = shell.run("run", "chain.yaml", *uploads, seconds=840)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^lora +LoRA +Succeeded +6/6 ", done.stdout, re.MULTILINE)
    assert re.search(r"^partial +Partial +Succeeded +6/6 ", done.stdout, re.MULTILINE)

    for name, kind in (("first", "model"), ("lora", "adapter"), ("partial", "model")):
        shell.run("storage", "cp", f"s3://out/{name}/{kind}/", f"{name}/")
    base, first = _weights(shell.folder / "model"), _weights(shell.folder / "first")
    assert any((base[name] != first[name]).any() for name in base)
    assert json.loads((shell.folder / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "s3://out/first/model"
    )
    partial = _weights(shell.folder / "partial")
    turned = {name for name in base if (base[name] != partial[name]).any()}
    parts = {re.sub(r"^(model\.layers\.\d+\.(self_attn|mlp))\..*", r"\1", name) for name in turned}
    assert len(parts) == 1, parts


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def _load(folder: Path) -> None:
    """In plain PEFT and transformers, as anybody would."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tuned = PeftModel.from_pretrained(base, str(folder / "adapter"))
    changed = [value for name, value in tuned.named_parameters() if "lora_B" in name]
    assert changed
    assert all(value.abs().max() > 0 for value in changed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "resources", [{"nodes": 2}, {"processesPerNode": 2}], ids=["two pods", "two processes of a pod"]
)
def test_several_ranks_train_one_adapter(shell: Shell, resources: dict[str, int]) -> None:
    spec = {**job()["spec"], "resources": resources, "checkpoint": {"everySteps": 4}}  # type: ignore[dict-item]
    spec["hyperparameters"] = {"maxSteps": 6, "learningRate": 1.0e-3, "maxLength": 128}
    shell.write("job.yaml", yaml.safe_dump({**job(), "spec": spec}))
    uploads = ("--upload", "model=s3://models/tiny", "--upload", "train.jsonl=s3://data/train.jsonl")
    done = shell.run("run", "job.yaml", *uploads, seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^tiny +LoRA +Succeeded +6/6 ", done.stdout, re.MULTILINE)
    shell.run("storage", "cp", "s3://out/tiny/", "out/")
    result = json.loads((shell.folder / "out" / "result.json").read_text())
    assert (result["worldSize"], result["globalBatchSize"]) == (2, 8)
    assert load_file(shell.folder / "out/checkpoints/step-00000006/rng.safetensors").keys() == {"0", "1"}
    wait_for(lambda: not processes_in(shell.folder))
