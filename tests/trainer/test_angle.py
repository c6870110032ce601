"""Fine-tuned angles: exact where the textbook's formula is not, over whole folders, and what is chosen by them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.selection import AngleSelection, ModuleKind
from finetune_api.strategy import StrategySpec
from finetune_trainer.angle import Angle, OtherModelError, angle_between, first_parts, measure, parts_of, read, to_json
from finetune_trainer.errors import UsageError
from finetune_trainer.loaded import Loaded
from finetune_trainer.report.svg import bar_chart
from finetune_trainer.strategies import strategy_of
from finetune_trainer.structure import Structure
from tests.support.architectures import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from tests.support.jobs import a_job, run
from tests.support.models import changed, save_tiny_llama

A, F, N, E, H = ModuleKind
FIELD = "spec.strategy.select.angle"


def between(u: torch.Tensor, v: torch.Tensor, pieces: int = 3) -> float:
    return angle_between(lambda: zip(u.chunk(pieces), v.chunk(pieces), strict=True))


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.3, math.pi / 2, 3.0, math.pi - 1e-7, math.pi])
def test_an_angle_is_exact_from_nothing_to_a_full_turn(angle):
    u = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64) * 7
    v = torch.tensor([math.cos(angle), math.sin(angle), 0, 0], dtype=torch.float64) * 0.01
    assert between(u, v) == pytest.approx(angle, rel=1e-7, abs=1e-15)


def test_length_alone_is_no_angle():
    u = torch.randn(1000, dtype=torch.float64)
    assert between(u, 3 * u) < 1e-14
    assert between(u, u) == 0
    assert between(torch.zeros(4), torch.zeros(4)) == 0
    assert between(torch.zeros(4), torch.ones(4)) == pytest.approx(math.pi / 2)


def test_an_angle_does_not_depend_on_how_the_vector_is_cut():
    u, v = torch.randn(999), torch.randn(999)
    expected = torch.arccos(torch.nn.functional.cosine_similarity(u.double(), v.double(), dim=0)).item()
    for pieces in (1, 2, 7, 999):
        assert between(u, v, pieces) == pytest.approx(expected, rel=1e-12)


def turned(folder: Path, source: Path, changes) -> Path:
    """A copy of a model's folder with other weights."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for part, change in changes.items():
        found = [name for name in tensors if part in name]
        assert found
        tensors |= {name: change(tensors[name]) for name in found}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Tensors that are changed, of block 1's attention and of block 0's feed-forward, and all tensors of the former.
FAMILIES = {
    "Llama": (tiny_llama, "layers.1.self_attn.o_proj", "layers.0.mlp.up_proj", r"layers\.1\.self_attn"),
    "BERT": (tiny_bert, "layer.1.attention.output.dense.weight", "layer.0.intermediate.dense.weight",
             r"layer\.1\.attention\.(self|output\.dense)"),
    "GPT-2": (tiny_gpt2, "h.1.attn.c_attn.weight", "h.0.mlp.c_fc.weight", r"h\.1\.attn"),
    # In files ViT's modules have the names of an older release.
    "ViT": (tiny_vit, "layer.1.attention.output.dense.weight", "layer.0.intermediate.dense.weight",
            r"layer\.1\.attention"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_are_compared_part_by_part(tmp_path, family):
    build, attention, feed_forward, whole = FAMILIES[family]
    model = build()
    model.save_pretrained(tmp_path / "base")
    changes = {attention: lambda tensor: tensor + 0.01, feed_forward: lambda tensor: tensor + 0.02}
    other = turned(tmp_path / "other", tmp_path / "base", changes)
    angles = measure(model, tmp_path / "base", other)
    assert {(angle.layer, angle.kind) for angle in angles if angle.angle > 0} == {(1, A), (0, F)}
    assert [(angle.layer, angle.kind) for angle in angles] == list(parts_of(Structure.of(model)))
    (found,) = [angle for angle in angles if (angle.layer, angle.kind) == (1, A)]
    before, after = (
        torch.cat([tensor.flatten().double() for name, tensor in sorted(file.items()) if re.search(whole, name)])
        for file in (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", other))
    )
    assert found.parameters == before.numel()
    expected = math.degrees(torch.arccos(torch.nn.functional.cosine_similarity(before, after, dim=0)).item())
    assert found.angle == pytest.approx(expected, rel=1e-6)


def test_models_with_other_blocks_are_not_compared(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "two")
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "three")
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "narrow")
    with pytest.raises(OtherModelError, match=r"two has no weights for model\.layers\.2"):
        measure(tiny_llama(num_hidden_layers=3), tmp_path / "two", tmp_path / "three")
    with pytest.raises(OtherModelError, match=r"gate_proj.weight has shape \[\(128, 64\)\]"):
        measure(tiny_llama(), tmp_path / "two", tmp_path / "narrow")


def angles(model=None) -> list[Angle]:
    """BERT's, growing with the block, attention and feed-forward of a block alike but for the last."""
    structure = Structure.of(model or tiny_bert())
    sizes = {name: parameter.numel() for name, parameter in structure.model.named_parameters()}
    return [
        Angle(layer=layer, kind=kind, angle=layer + (0.5 if (layer, kind) == (2, F) else 0),
              parameters=sum(sizes[name] for name in names))
        for (layer, kind), names in parts_of(structure).items()
    ]  # fmt: skip


CHOICES = {
    "the largest": ({}, {"topK": 2}, {(2, F), (2, A)}),
    "the smallest, attention before feed-forward": ({}, {"topK": 1, "order": "Smallest"}, {(0, A)}),
    "ties go to the block nearer to the input": (
        {"modules": ["Attention"]}, {"topK": 2, "order": "Smallest"}, {(0, A), (1, A)}
    ),
    "within chosen layers": ({"layers": {"first": 2}}, {"topK": 1}, {(1, A)}),
    "beside other kinds": ({"modules": ["FeedForward", "Head"]}, {"topK": 1}, {(2, F), (None, H)}),
    "with norms of their layers": (
        {"layers": {"last": 1}, "modules": ["Attention", "LayerNorm"]}, {"topK": 1}, {(2, A), (2, N), (None, N)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_angles_choose_among_what_is_selected(tmp_path, case):
    select, angle, expected = CHOICES[case]
    path = tmp_path / "angles.json"
    path.write_text(to_json(angles()))
    spec = StrategySpec.from_wire(
        {"type": "Partial", "select": select | {"angle": {"from": "s3://bucket/angles.json"} | angle}}
    )
    strategy = strategy_of(spec)
    strategy.gather(lambda field, uri: path, tmp_path)
    model = strategy.prepare(Loaded(tiny_bert()))
    places = Structure.of(model).places
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, place in places.items() if (place.layer, place.kind) in expected}


def test_more_parts_than_there_are_are_refused():
    structure = Structure.of(tiny_bert())
    names = {name for name, place in structure.places.items() if place.kind is A}
    select = AngleSelection.from_wire({"from": "s3://bucket/angles.json", "topK": 4})
    with pytest.raises(UsageError) as refusal:
        first_parts(structure, names, angles(), select, FIELD)
    assert refusal.value.message == f"{FIELD}.topK is 4, but only 3 attention and feed-forward parts are chosen"
    assert refusal.value.advice.startswith("set topK to at most 3")


def test_angles_of_another_architecture_are_refused():
    structure = Structure.of(tiny_bert())
    select = AngleSelection.from_wire({"from": "s3://bucket/angles.json", "topK": 1})
    with pytest.raises(UsageError, match=r"angle.from: these angles are another architecture's: .* of block"):
        first_parts(structure, set(structure.places), angles(tiny_bert(num_hidden_layers=4)), select, FIELD)


@pytest.mark.parametrize("text", ["{}", "[{}]", "not json", '[{"layer": 1, "kind": "Head?", "angle": 1}]'])
def test_what_holds_no_angles_is_refused(tmp_path, text):
    path = tmp_path / "angles.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"spec.strategy.select.angle.from: angles.json does not hold angles: "):
        read(path, f"{FIELD}.from")


def test_angles_are_drawn_as_bars():
    svg = bar_chart("Angle", {"Attention": [(0, 1.0), (1, 4.0)], "FeedForward": [(0, 2.0), (1, 0.0)]})
    assert svg.count("<rect") == 4
    assert ">Attention</text>" in svg
    assert bar_chart("Angle", {}) == ""


def test_a_probe_job_tells_the_next_job_what_to_train(tmp_path):
    save_tiny_llama(tmp_path / "model", torch.bfloat16)
    full = run(a_job(tmp_path, "Full", output={"uri": f"file://{tmp_path / 'probe'}"}), tmp_path / "one")
    found = json.loads((tmp_path / "probe/report/angles.json").read_text())
    assert {(angle["layer"], angle["kind"]) for angle in found} == {(i, k.value) for i in (0, 1) for k in (A, F)}
    assert all(0 < angle["angle"] < 90 for angle in found)
    assert "Fine-tuned angles" in (tmp_path / "probe/report/index.html").read_text()
    last = min(found, key=lambda angle: angle["angle"])
    for source in (full.output.report + "/angles.json", full.output.uri):
        select = {"angle": {"from": source, "topK": 1, "order": "Smallest"}}
        scratch = tmp_path / source.rpartition("/")[2]
        out = {"output": {"uri": f"file://{scratch / 'out'}"}}
        run(a_job(tmp_path, "Partial", select=select, **out), scratch)
        before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "model", scratch / "out/model"))
        part = "self_attn" if last["kind"] == "Attention" else "mlp"
        assert changed(before, after) == {n for n in before if f"layers.{last['layer']}.{part}." in n}
