"""Preparing data: rows a second against a plain script over datasets and TRL, and the memory of a million rows.

Both sides read the same JSONL, tokenise it with SmolLM2's tokenizer, mask it and put it into packs, in the same number
of processes; timed is what comes after the imports. On a quiet machine: `python -m bench.preparation [pairs] [rows]`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.memory import Peak
from tests.support.models import smollm2_tokenizer

from bench.common import interleaved, median, report
from bench.training import ENVIRON, ROOT, WORDS

PROCESSES = 2
MAX_LENGTH = 1024
MILLION = 1_000_000
LIMIT_MIB = 1536
MIB = 1024 * 1024
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""With the assistant's words marked, without which the plain script could not mask them."""


def texts(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(1)
    return ({"text": f"{number}: {words(rng, 20, 120)}."} for number in range(count))


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """One or two questions with their answers."""
    rng = random.Random(1)
    for number in range(count):
        turns = [("user", f"{number}: {words(rng, 5, 30)}?"), ("assistant", f"{words(rng, 10, 60)}.")]
        turns += [("user", f"{words(rng, 5, 30)}?"), ("assistant", f"{words(rng, 10, 60)}.")] * (number % 2)
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


KINDS = {"texts": texts, "conversations": conversations}


class Bench:
    """The folder with the tokenizer and the data, and one run of each side."""

    def __init__(self, folder: Path) -> None:
        self._work = folder / "work"
        self._tokenizer = folder / "tokenizer"
        tokenizer = smollm2_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(self._tokenizer)

    def compare(self, kind: str, rows: int, pairs: int) -> None:
        data = self._data(kind, rows)
        self.fresh()
        self.plain(data)  # the first run of all reads the libraries from disk
        ours, theirs = interleaved(lambda: self.ours(data), lambda: self.plain(data), pairs, self.fresh)
        report(
            f"preparation, {kind}",
            unit="rows/s",
            ratio=median(theirs) / median(ours),
            target=">= 1.0",
            ours=rows / median(ours),
            plain_datasets=rows / median(theirs),
            rows=rows,
            processes=PROCESSES,
            runs=pairs,
        )

    def hold(self, kind: str, rows: int) -> None:
        """The memory of our side with so many rows, and whether it told how far it was."""
        data = self._data(kind, rows)
        self.fresh()
        command = [sys.executable, "-m", "bench.preparation", "ours", str(self._tokenizer), str(data), str(self._work)]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stdout=subprocess.PIPE, text=True)
        with Peak(process.pid) as peak:
            output, _ = process.communicate()
        done = json.loads(output)
        report(
            f"preparation, memory of {rows:,} {kind}",
            unit="MiB",
            peak_pss=peak.most.pss / MIB,
            target=f"< {LIMIT_MIB}",
            peak_anonymous=peak.most.anonymous / MIB,
            rows_per_second=rows / done["seconds"],
            progress_reports=done["reports"],
            packs=done["packs"],
        )

    def ours(self, data: Path) -> float:
        return self._run("-m", "bench.preparation", "ours", str(self._tokenizer), str(data), str(self._work))

    def plain(self, data: Path) -> float:
        settings = (str(PROCESSES), str(MAX_LENGTH))
        return self._run("bench/plain_datasets.py", str(self._tokenizer), str(data), str(self._work), *settings)

    def fresh(self) -> None:
        """Nothing that an earlier run has made, and no bytes still on their way to the disk."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        os.sync()

    def _run(self, *arguments: str) -> float:
        environ = ENVIRON | {"HF_HOME": str(self._work), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout.splitlines()[-1])["seconds"])

    def _data(self, kind: str, rows: int) -> Path:
        path = self._work.parent / f"{kind}-{rows}.jsonl"
        if not path.exists():
            with path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in KINDS[kind](rows))
        return path


def ours(tokenizer_folder: str, data: str, scratch: str) -> None:
    """What the process of our side does."""
    from transformers import AutoTokenizer

    from finetune_api.job import DatasetSpec, TaskType
    from finetune_trainer.data.preparation import prepare
    from finetune_trainer.data.sources import NamedFile

    tokenizer, uri, reports = AutoTokenizer.from_pretrained(tokenizer_folder), f"file://{data}", []
    task = TaskType.CAUSAL_LM if "texts" in data else TaskType.INSTRUCTION
    began = time.monotonic()
    prepared = prepare(
        [NamedFile(uri, Path(data))],
        DatasetSpec(uri=uri),
        task,
        tokenizer,
        max_length=MAX_LENGTH,
        seed=1,
        scratch=Path(scratch),
        packing=True,
        processes=PROCESSES,
        progress=lambda part, rows: reports.append(rows),
    )
    seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds, "packs": prepared.report["packs"]["training"], "reports": len(reports)}))


def main(pairs: int, rows: int) -> None:
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name:
        bench = Bench(Path(name))
        for kind in KINDS:
            bench.compare(kind, rows, pairs)
        bench.hold("conversations", MILLION)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        ours(*sys.argv[2:])
    else:
        numbers = [int(value) for value in sys.argv[1:]]
        main(*numbers, *(5, 100_000)[len(numbers) :])
