"""What lies in the repository is what the types say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune_api.crd import build_crd
from finetune_operator.generate import crd_yaml, generated, main

ROOT = Path(__file__).parents[2]


def test_the_files_are_up_to_date() -> None:
    assert main(["--check", "--root", str(ROOT)]) == 0


def test_the_yaml_says_what_was_built() -> None:
    assert yaml.safe_load(crd_yaml()) == build_crd()
    assert "&id" not in crd_yaml()


def test_kubectl_apply_can_keep_the_crd_in_its_annotation() -> None:
    assert len(crd_yaml()) < 256 * 1024


def test_drift_is_shown_and_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 0
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == generated().keys()
    file = tmp_path / "crds" / "finetunejobs.yaml"
    file.write_text(file.read_text().replace("maximum: 1024\n", "maximum: 1023\n", 1))
    assert main(["--check", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "maximum: 1023" in said
    assert "run `make crds` and commit what it writes" in said


def test_the_reference_names_every_field_and_every_rule() -> None:
    page = generated()["docs/api.md"]
    assert "## spec.strategy.lora" in page
    assert "| `rank` | integer ≥ 1, ≤ 1024 | `16` | Rank r of the update. |" in page
    assert "strategy.lora belongs to the types LoRA and QLoRA; remove it or change strategy.type" in page
    assert "| STEP | always | Optimizer steps done, of all. |" in page


def test_every_link_of_the_reference_leads_to_a_section() -> None:
    page = generated()["docs/api.md"]
    sections = {
        "".join(letter for letter in line.lower() if letter.isalnum())
        for line in page.splitlines()
        if line.startswith("## ")
    }
    links = {part.split(")")[0] for part in page.split("](#")[1:]}
    assert links
    assert links <= sections
