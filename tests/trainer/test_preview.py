"""What will train is known from the configuration alone, and is what then trains."""

from __future__ import annotations

import json
import shutil

import pytest

from finetune_trainer.errors import UsageError
from finetune_trainer.model import parameter_counts
from finetune_trainer.preview import main, preview, ranges
from tests.support.jobs import a_context, a_job, a_session
from tests.support.models import save_tiny_llama

STRATEGIES = {
    "Full": {},
    "LoRA": {"lora": {"rank": 3, "modulesToSave": ["norm"]}},
    "QLoRA": {},
    "Partial": {"select": {"layers": {"last": 1}, "modules": ["Attention", "Head"]}},
    "LayerNorm": {},
    "Adapter": {"adapter": {"size": 4, "layers": {"last": 1}}},
    "PromptTuning": {"promptTuning": {"tokens": 3, "initText": "Say it."}},
    "PrefixTuning": {"prefixTuning": {"tokens": 3}},
    "IA3": {},
    "Additive": {"additive": {"blocks": 1, "head": True}},
}


def config_alone(root):
    """A folder with nothing but the configuration."""
    (root / "config").mkdir()
    shutil.copy(root / "model" / "config.json", root / "config")
    return root / "config"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_preview_is_what_trains(tmp_path, strategy):
    job = a_job(tmp_path, strategy, **STRATEGIES[strategy])
    found = preview(job.spec, config_alone(tmp_path))
    session = a_session(job, tmp_path / "scratch")
    assert (found.trainable, found.total) == session.parameters == parameter_counts(session.trainer.model)
    assert sum(learning.parameters for learning in found.modules) == found.trainable
    assert found.share == found.trainable / found.total


def test_modules_are_told_by_kind_and_blocks(tmp_path):
    job = a_job(tmp_path, "Partial", select={"modules": ["LayerNorm", "Embedding"]})
    found = preview(job.spec, config_alone(tmp_path))
    assert [(part.module, part.kind.value, part.layers) for part in found.modules] == [
        ("model.embed_tokens", "Embedding", None),
        ("input_layernorm", "LayerNorm", "0-1"),
        ("post_attention_layernorm", "LayerNorm", "0-1"),
        ("model.norm", "LayerNorm", None),
    ]


def test_what_is_measured_first_is_said(tmp_path):
    angle = {"from": "s3://bucket/angles.json", "topK": 1}
    job = a_job(tmp_path, "Partial", select={"angle": angle, "fisher": {"fraction": 0.25, "samples": 8}})
    found = preview(job.spec, config_alone(tmp_path))
    assert {part.kind.value for part in found.modules} == {"Attention", "FeedForward"}
    assert found.notes == [
        "of the attention and feed-forward parts only 1: those with the largest angles in s3://bucket/angles.json",
        "of these 0.25 of the elements, by the Fisher information of 8 rows at the start",
    ]
    assert found.trainable == round(sum(part.parameters for part in found.modules) / 4)


def test_a_model_of_70_billion_parameters_takes_no_memory(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    save_tiny_llama(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | sizes | {"head_dim": 128, "vocab_size": 128256}
    folder = config_alone(tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    found = preview(a_job(tmp_path, "Partial", select={"layers": {"last": 4}}).spec, folder)
    assert found.total > 65e9
    assert {part.layers for part in found.modules} == {"76-79"}


def test_the_command_prints_json_or_why_not(tmp_path, capsys):
    context = a_context(a_job(tmp_path, "Partial", select={"layers": {"indices": [1]}}), tmp_path / "scratch")
    folder = config_alone(tmp_path)
    assert main([str(context.job_file), str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["modules"][0]["layers"] == "1"
    context = a_context(a_job(tmp_path, "Partial", select={"layers": {"indices": [7]}}), tmp_path / "scratch")
    assert main([str(context.job_file), str(folder)]) == 64
    refused = "spec.strategy.select.layers.indices: there is no block 7; the model has blocks 0 to 1; count from 0"
    assert capsys.readouterr().err.startswith(refused)
    with pytest.raises(UsageError):
        preview(context.job.spec, folder)


def test_numbers_in_a_row_are_a_range():
    assert ranges({5, 0, 2, 1, 8, 9}) == "0-2, 5, 8-9"
