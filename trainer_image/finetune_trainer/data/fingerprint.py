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


def fingerprint(files: Sequence[NamedFile], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str:
    """32 hex digits over the files' names, sizes and times, the tokenizer with its template, and the settings."""
    stats = [(file.name, file.path.stat()) for file in files]
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    facts = [
        LAYOUT,
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        str(tokenizer.chat_template),
        tokenizer.special_tokens_map,
        [str(setting) for setting in settings],
    ]
    digest.update(json.dumps(facts, default=str).encode())
    return digest.hexdigest()[:32]
