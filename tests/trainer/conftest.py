"""The trainer's tests run the worker in this process; it starts others of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def importable() -> None:
    """Let child processes find the packages where they are not installed."""
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "trainer_image"))
