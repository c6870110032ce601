"""Real texts with labels that every Python carries: docstrings and comments, and what their module is for."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

AREAS = {
    "code": "ast bdb codeop dis doctest importlib inspect modulefinder pdb pickletools pkgutil profile py_compile "
    "pydoc symtable tokenize trace traceback tracemalloc unittest",
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "files": "bz2 filecmp fileinput fnmatch genericpath glob gzip lzma mimetypes netrc ntpath os pathlib posixpath "
    "shutil stat tarfile tempfile zipapp zipfile zipimport",
    "mail": "email imaplib mailbox poplib quopri smtplib",
    "numbers": "_pydatetime _pydecimal _strptime calendar colorsys datetime fractions numbers random statistics "
    "zoneinfo",
    "text": "argparse codecs configparser csv difflib encodings gettext json locale optparse plistlib pprint re "
    "shlex string textwrap tomllib",
    "types": "_collections_abc abc collections contextlib copy dataclasses enum functools graphlib heapq reprlib "
    "types typing weakref",
    "web": "_markupbase ftplib html http ipaddress socket socketserver ssl urllib uuid webbrowser wsgiref xml xmlrpc",
}
"""Area -> modules and packages of the standard library."""
MIN_LENGTH, MAX_LENGTH = 40, 400
"""Characters of a text: shorter ones say nothing, longer ones are cut."""


def texts(source: str) -> Iterator[str]:
    """The docstrings of a module's source, then its blocks of comments, each in one line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split())
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.strip().startswith("#"):
            block.append(line.strip("#! \t"))
        elif block:
            yield " ".join(block)
            block = []


def files_of(module: str) -> list[Path]:
    """The source files of a module or package, without its tests; none where this Python does not have it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]
    return [path for path in found if path.is_file() and not {"test", "tests"} & set(path.parts)]


def rows() -> list[dict[str, str]]:
    """Every text once, with the area of the module that has it first; shuffled, the same every time."""
    areas: dict[str, str] = {}
    for area, modules in AREAS.items():
        for module in modules.split():
            for path in files_of(module):
                for text in texts(path.read_text("utf-8")):
                    if len(text) >= MIN_LENGTH:
                        areas.setdefault(text[:MAX_LENGTH], area)
    found = [{"text": text, "label": area} for text, area in sorted(areas.items())]
    random.Random(0).shuffle(found)
    return found


def write(folder: Path) -> Path:
    """Write rows.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path
