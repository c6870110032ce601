"""Real numbers for real texts that every Python carries: how long the function is that a docstring describes."""

from __future__ import annotations

import ast
import json
import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}
MIN_LENGTH, MAX_LENGTH = 20, 400
"""Characters of a docstring: shorter ones say nothing, longer ones are cut."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[tuple[str, float]]:
    """(signature and docstring, binary logarithm of the lines after it) of every function that has both."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Function) or not node.body[1:]:
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        if len(text) >= MIN_LENGTH:
            # As ast writes them, without comments and blank lines.
            lines = sum(len(ast.unparse(statement).splitlines()) for statement in node.body[1:])
            yield f"{node.name}({ast.unparse(node.args)}): {text[:MAX_LENGTH]}", math.log2(lines)


def rows() -> list[dict[str, object]]:
    """Every text of the standard library once; shuffled, the same every time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    labels: dict[str, float] = {}
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            for text, label in functions(path.read_text("utf-8")):
                labels.setdefault(text, label)
    found = [{"text": text, "label": round(label, 4)} for text, label in sorted(labels.items())]
    random.Random(0).shuffle(found)
    return found


def write(folder: Path) -> Path:
    """Write rows.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path
