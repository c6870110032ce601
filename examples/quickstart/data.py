"""Real instruction pairs that every Python carries: "What does X do?" -> the first sentences of X's docstring."""

from __future__ import annotations

import importlib
import inspect
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

MODULES = """
argparse ast asyncio base64 bisect calendar collections concurrent.futures configparser contextlib copy csv
dataclasses datetime decimal difflib email.message enum fractions functools glob gzip hashlib heapq hmac html
http.client inspect io ipaddress itertools json logging lzma math mimetypes operator os os.path pathlib pickle
platform pprint queue random re sched secrets shelve shlex shutil signal socket sqlite3 ssl statistics string struct
subprocess tarfile tempfile textwrap threading time timeit tokenize traceback types unittest urllib.parse
urllib.request uuid warnings weakref xml.etree.ElementTree zipfile zlib
"""
MIN_LENGTH, MAX_LENGTH = 40, 400
"""Characters of an answer: shorter ones say nothing, longer ones are reference manuals."""
QUESTIONS = (
    "What does `{name}` do in Python?",
    "Explain Python's `{name}` in a few sentences.",
    "What is `{name}` for?",
)


def documented(module_name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the public functions, classes and methods of a module."""
    module = importlib.import_module(module_name)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        yield f"{module_name}.{name}", inspect.getdoc(value) or ""
        if inspect.isclass(value) and value.__module__.split(".")[0] == module_name.split(".", maxsplit=1)[0]:
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.isroutine(function):
                    yield f"{module_name}.{name}.{method}", inspect.getdoc(function) or ""


def answer_of(docstring: str) -> str | None:
    """The first paragraph in one line, or None where it is too short or only a signature."""
    paragraphs = [" ".join(part.split()) for part in docstring.split("\n\n")]
    text = next((part for part in paragraphs if not ("(" in part[:30] and "->" in part)), "")
    return text if MIN_LENGTH <= len(text) <= MAX_LENGTH else None


def pairs(seed: int = 0) -> list[dict[str, object]]:
    """All pairs as conversations, each answer once, in a shuffled order that depends on the seed alone."""
    answers: dict[str, str] = {}
    for module in MODULES.split():
        for name, docstring in documented(module):
            answer = answer_of(docstring)
            if answer is not None:
                answers.setdefault(answer, name)
    rng = random.Random(seed)
    rows = [conversation(rng.choice(QUESTIONS).format(name=name), answer) for answer, name in sorted(answers.items())]
    rng.shuffle(rows)
    return rows


def conversation(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def topics() -> list[dict[str, str]]:
    """Plain texts: the chapters of the language reference that `help()` shows."""
    from pydoc_data.topics import topics as texts

    return [{"text": text.strip()} for _, text in sorted(texts.items())]


def write(folder: Path, held_out: int = 32, limit: int = 1200) -> tuple[Path, Path]:
    """Write train.jsonl and validation.jsonl, whose rows are never trained on, and topics.jsonl with plain texts."""
    rows = pairs()[: limit + held_out]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(files, (rows[held_out:], rows[:held_out]), strict=True):
        _write(path, part)
    _write(folder / "topics.jsonl", topics())
    return files


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
