"""Write, or check, what is generated from the types: the CRDs and the API reference (`make crds`, `make lint`)."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from finetune_api.crd import build_crd, job_schema
from finetune_api.reference import reference
from finetune_api.structural import lint

HEADER = "# Generated from crds/finetune_api by `make crds`; edit the types, not this file.\n"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1: the schema is no good, or with --check a file is not what the types say."""
    parser = argparse.ArgumentParser(prog="python -m finetune_operator.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; show what would change")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository; default: the working directory")
    options = parser.parse_args(arguments)
    if findings := lint(job_schema()):
        print(*(f"FineTuneJob: {finding}" for finding in findings), sep="\n", file=sys.stderr)
        return 1
    files = {options.root / path: text for path, text in generated().items()}
    return _check(files) if options.check else _write(files)


def generated() -> dict[str, str]:
    """The text of every generated file, by its path in the repository."""
    return {"crds/finetunejobs.yaml": crd_yaml(), "docs/api.md": reference()}


def crd_yaml() -> str:
    """The CRD as YAML, in the order of the types."""
    # Through JSON, so that what several places share is written out instead of as a YAML anchor.
    document = json.loads(json.dumps(build_crd()))
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)


def _write(files: Mapping[Path, str]) -> int:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


def _check(files: Mapping[Path, str]) -> int:
    drifted = 0
    for path, text in files.items():
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        changes = difflib.unified_diff(
            there.splitlines(keepends=True), text.splitlines(keepends=True), f"{path}", f"{path} (from the types)"
        )
        sys.stderr.writelines(changes)
        drifted += there != text
    if drifted:
        print("run `make crds` and commit what it writes", file=sys.stderr)
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
