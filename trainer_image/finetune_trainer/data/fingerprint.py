"""A name for prepared data that changes with whatever it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.sources import NamedFile

LAYOUT = 1
"""Raised when the same input is prepared differently or written in another form."""


def fingerprint(files: Sequence[NamedFile], tokenizer: PreTrainedTokenizerBase | None, *settings: Any) -> str:
    """32 hex digits over the files' names, sizes and times, the tokenizer with its template, and the settings."""
    stats = [(file.name, file.path.stat()) for file in files]
    facts = [
        LAYOUT,
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        _facts_of(tokenizer) if tokenizer else None,
        [str(setting) for setting in settings],
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]


def _facts_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), tokenizer.special_tokens_map]
