"""Where the objects of the in-memory API server outlive their process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StateFile:
    """All objects in one JSON file, replaced as a whole, so that a killed process leaves the old or the new state."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Any]:
        """The stored state, or an empty dict."""
        if not self._path.exists():
            return {}
        state: dict[str, Any] = json.loads(self._path.read_text())
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what is stored."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._path)
