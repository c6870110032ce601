"""From files to datasets, whole: what is refused, dropped, cut, held out, packed, reported and found again."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune_api.job import DatasetFormat, DatasetSpec, InvalidRowPolicy, TaskType, ValidationData
from finetune_trainer.data.encoding import IGNORED
from finetune_trainer.data.preparation import Prepared, prepare
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.errors import DataError
from tests.data import tokenizers
from tests.support.memory import Peak

Write = Callable[[str, Any], NamedFile]
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
ENDS = "<|im_end|>"


def row(number: int) -> dict[str, Any]:
    turns = [f"question {number}?", f"answer {number}"]
    return {"messages": [{"role": ("user", "assistant")[i], "content": text} for i, text in enumerate(turns)]}


class Preparer:
    """Calls `prepare` with what most tests need, each time from the same scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.tokenizer: PreTrainedTokenizerBase = tokenizers.chatml()

    def __call__(
        self,
        *files: NamedFile,
        task: TaskType = TaskType.INSTRUCTION,
        max_length: int = 512,
        seed: int = 1,
        scratch: Path | None = None,
        spec: dict[str, Any] | None = None,
        **options: Any,
    ) -> Prepared:
        dataset = DatasetSpec(uri="s3://bucket/data/*", **(spec or {}))
        return prepare(
            files,
            dataset,
            task,
            self.tokenizer,
            max_length=max_length,
            seed=seed,
            scratch=scratch or self.scratch,
            **options,
        )


@pytest.fixture
def preparer(tmp_path: Path) -> Preparer:
    return Preparer(tmp_path / "scratch")


def texts(preparer: Preparer, dataset: Dataset | None) -> list[str]:
    assert dataset is not None
    return [preparer.tokenizer.decode([label for label in item["labels"] if label != IGNORED]) for item in dataset]


def test_rows_come_in_the_order_of_the_files_with_only_answers_learned(preparer: Preparer, data_file: Write) -> None:
    prepared = preparer(data_file("b.jsonl", [row(2), row(3)]), data_file("a.jsonl", [row(0), row(1)]))
    assert texts(preparer, prepared.train) == [f"answer {number}{ENDS}" for number in range(4)]
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert prepared.validation is None


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("messages.jsonl", "messages"),
        ("sharegpt.jsonl", "sharegpt"),
        ("alpaca.json", "alpaca"),
        ("prompt-completion.csv", "prompt-completion"),
        ("text.txt", "text"),
        ("tools.jsonl", "messages"),
        ("tools-sharegpt.jsonl", "sharegpt"),
    ],
)
def test_every_example_file_is_recognised_and_used_whole(preparer: Preparer, name: str, format_name: str) -> None:
    preparer.tokenizer = tokenizers.chatml(tokenizers.KNOWS_TOOLS)
    task = TaskType.CAUSAL_LM if format_name == "text" else TaskType.INSTRUCTION
    prepared = preparer(NamedFile(f"s3://bucket/{name}", EXAMPLES / name), task=task)
    assert prepared.report["format"] == format_name
    assert prepared.report["warnings"] == []
    assert len(prepared.train) == prepared.report["training"]["rows"] > 1


def test_all_wrong_rows_are_counted_and_the_first_is_told_in_detail(preparer: Preparer, data_file: Write) -> None:
    wrong = {"messages": [{"role": "user", "content": "?"}]}
    content = "".join(json.dumps(item) + "\n" for item in [row(0), wrong, row(1), *[wrong] * 6]) + '{"messages": ['
    with pytest.raises(DataError) as refusal:
        preparer(data_file("conversations.jsonl", content))
    message = refusal.value.message
    assert message.startswith("s3://bucket/data/conversations.jsonl:2: messages: there is no assistant turn")
    assert "7 more rows cannot be used: s3://bucket/data/conversations.jsonl:4:" in message
    assert message.endswith("and 4 more)")
    assert "onInvalidRow to Drop" in refusal.value.advice
    assert refusal.value.exit_code == 65


def test_wrong_rows_are_dropped_and_counted_where_that_is_asked_for(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", json.dumps(row(0)) + '\n{"cut": \n[]\n' + json.dumps(row(1)) + "\n")
    prepared = preparer(file, spec={"on_invalid_row": InvalidRowPolicy.DROP})
    assert texts(preparer, prepared.train) == [f"answer 0{ENDS}", f"answer 1{ENDS}"]
    dropped = prepared.report["training"]["dropped"]
    assert dropped["count"] == 2
    assert dropped["files"] == {"s3://bucket/data/a.jsonl": 2}
    assert dropped["first"][0].startswith("s3://bucket/data/a.jsonl:2: the JSON is cut off")
    (warning,) = prepared.report["warnings"]
    assert warning.startswith("training: 2 of 4 rows were dropped; the first: s3://bucket/data/a.jsonl:2")


def test_a_dataset_without_a_usable_row_fails_even_where_rows_may_be_dropped(
    preparer: Preparer, data_file: Write
) -> None:
    file = data_file("a.jsonl", [{"messages": [{"role": "user", "content": "?"}]}] * 3)
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages: there is no assistant turn.*2 more rows") as refusal:
        preparer(file, spec={"on_invalid_row": InvalidRowPolicy.DROP})
    assert "not one of its rows" in refusal.value.advice


@pytest.mark.parametrize("content", ["", "\n\n", "not json\n", "\xff"])
def test_a_dataset_without_readable_rows_is_refused_by_name(preparer: Preparer, data_file: Write, content: str) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/data/a\.jsonl"):
        preparer(data_file("a.jsonl", content.encode("latin-1")))


def test_an_empty_file_among_others_is_refused_by_name(preparer: Preparer, data_file: Write) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/data/b\.jsonl: the file has no rows"):
        preparer(data_file("a.jsonl", [row(0)]), data_file("b.jsonl", ""))


def test_a_named_format_is_held_to(preparer: Preparer, data_file: Write) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: instruction is missing; the fields here are messages"):
        preparer(data_file("a.jsonl", [row(0)]), spec={"format": DatasetFormat.ALPACA})


def test_rows_that_are_too_long_are_cut_and_the_loss_is_reported(preparer: Preparer, data_file: Write) -> None:
    long = row(1)
    long["messages"][1]["content"] = "word " * 100
    prepared = preparer(data_file("a.jsonl", [row(0), long]), max_length=64)
    assert max(len(item["input_ids"]) for item in prepared.train) == 64
    (warning,) = prepared.report["warnings"]
    assert warning.startswith("training: 1 of 2 rows were cut to hyperparameters.maxLength 64")
    assert str(prepared.report["training"]["longestRowTokens"]) in warning


def test_a_row_whose_answer_is_cut_away_is_named_by_file_and_line(preparer: Preparer, data_file: Write) -> None:
    long = row(1)
    long["messages"][0]["content"] = "word " * 100
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row has \d+ tokens .* beyond hyperparameters\.maxLength 64"):
        preparer(data_file("a.jsonl", [row(0), long]), max_length=64)


def test_a_share_of_the_rows_is_held_out_exactly_and_by_the_seed_alone(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", [row(number) for number in range(50)])
    spec = {"validation": ValidationData(fraction=0.1)}
    prepared, other = preparer(file, spec=spec), preparer(file, spec=spec, seed=2)
    train, validation = texts(preparer, prepared.train), texts(preparer, prepared.validation)
    assert (len(train), len(validation)) == (45, 5)
    assert sorted(train + validation) == sorted(f"answer {number}{ENDS}" for number in range(50))
    assert texts(preparer, other.validation) != validation
    again = preparer(file, spec=spec, scratch=preparer.scratch / "elsewhere")
    assert texts(preparer, again.validation) == validation
    assert prepared.report["rows"] == {"training": 45, "validation": 5}


def test_a_share_of_one_row_cannot_be_held_out(preparer: Preparer, data_file: Write) -> None:
    with pytest.raises(DataError, match=r"dataset\.validation\.fraction: the dataset has one usable row"):
        preparer(data_file("a.jsonl", [row(0)]), spec={"validation": ValidationData(fraction=0.5)})


def test_parts_of_a_split_text_stay_on_one_side(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", [{"text": f"{number} " * 100} for number in range(10, 20)])
    prepared = preparer(file, task=TaskType.CAUSAL_LM, max_length=32, spec={"validation": ValidationData(fraction=0.3)})
    held_out = {text.split()[0] for text in texts(preparer, prepared.validation) if text.strip(f" {ENDS}")}
    trained = {text.split()[0] for text in texts(preparer, prepared.train) if text.strip(f" {ENDS}")}
    assert len(prepared.train) > 7
    assert not {text for text in held_out & trained if len(text) == 2}


def test_held_out_rows_may_come_from_files_of_their_own(preparer: Preparer, data_file: Write) -> None:
    prepared = preparer(
        data_file("a.jsonl", [row(0)]), validation_files=[data_file("v.csv", "instruction,output\nwhy?,because\n")]
    )
    assert texts(preparer, prepared.validation) == [f"because{ENDS}"]
    assert [sample.reference for sample in prepared.samples] == ["because"]


def test_samples_are_held_out_prompts_ready_for_generation(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", [row(number) for number in range(20)])
    prepared = preparer(file, spec={"validation": ValidationData(fraction=0.2)}, samples=2)
    assert len(prepared.samples) == 2
    for sample in prepared.samples:
        number = sample.prompt.removeprefix("question ").removesuffix("?")
        assert sample.reference == f"answer {number}"
        assert preparer.tokenizer.decode(sample.input_ids) == (
            f"<|im_start|>user\nquestion {number}?{ENDS}\n<|im_start|>assistant\n"
        )
        assert f"answer {number}{ENDS}" in texts(preparer, prepared.validation)


def test_the_report_shows_what_is_learned(preparer: Preparer, data_file: Write) -> None:
    facts = preparer(data_file("a.jsonl", [row(0), row(1)])).report["training"]
    assert facts["sample"] == f"<|im_start|>user\nquestion 0?{ENDS}\n<|im_start|>assistant\n[[answer 0{ENDS}]]\n"
    assert facts["rows"] == 2
    assert 0 < facts["learnedTokens"] < facts["tokens"]
    assert facts["learnedShare"] == round(facts["learnedTokens"] / facts["tokens"], 4)


@pytest.mark.parametrize(
    ("make", "task", "ends"),
    [
        (tokenizers.chatml, TaskType.INSTRUCTION, ["<|im_end|>"]),
        (tokenizers.llama_3, TaskType.INSTRUCTION, ["<|eot_id|>", "<|end_of_text|>"]),
        (tokenizers.llama_3, TaskType.CAUSAL_LM, ["<|end_of_text|>"]),
    ],
)
def test_generation_is_told_every_token_that_ends_an_answer(
    preparer: Preparer, data_file: Write, make: Callable[[], PreTrainedTokenizerBase], task: TaskType, ends: list[str]
) -> None:
    preparer.tokenizer = make()
    content = [row(0)] if task is TaskType.INSTRUCTION else [{"text": "plain"}]
    prepared = preparer(data_file("a.jsonl", content), task=task)
    assert prepared.eos_token_ids == preparer.tokenizer.convert_tokens_to_ids(ends)


def test_the_default_template_is_exported_with_the_tokenizer(
    preparer: Preparer, data_file: Write, tmp_path: Path
) -> None:
    preparer.tokenizer = tokenizers.sentence_piece()
    prepared = preparer(data_file("a.jsonl", [row(0)]))
    assert prepared.report["template"] == "default"
    preparer.tokenizer.save_pretrained(tmp_path / "model")
    assert "ASSISTANT" in (tmp_path / "model" / "chat_template.jinja").read_text()


def test_packs_are_prepared_once_and_hold_all_rows(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", [row(number) for number in range(40)])
    prepared = preparer(file, packing=True, max_length=256, spec={"validation": ValidationData(fraction=0.1)})
    assert prepared.packed
    assert prepared.validation is not None
    assert sum(len(item["seq_lengths"]) for item in prepared.train) == 36
    assert sum(len(item["seq_lengths"]) for item in prepared.validation) == 4
    assert prepared.report["packs"] == {"training": len(prepared.train), "validation": len(prepared.validation)}
    assert len(prepared.train) < 20


def test_what_was_prepared_is_taken_up_and_not_prepared_again(preparer: Preparer, data_file: Write) -> None:
    calls: list[tuple[str, int]] = []
    file = data_file("a.jsonl", [row(number) for number in range(1000)])

    def prepared() -> Prepared:
        return preparer(file, progress=lambda part, rows: calls.append((part, rows)))

    first = prepared()
    assert calls == [("training", 1000)]
    second = prepared()
    assert calls == [("training", 1000)]
    assert second.train[:] == first.train[:]
    assert (second.report, second.samples, second.eos_token_ids) == (first.report, first.samples, first.eos_token_ids)
    file.path.write_text(json.dumps(row(7)))
    assert len(prepared().train) == 1, "another content is another dataset"


def test_what_a_killed_process_left_behind_is_not_taken_for_a_dataset(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", [row(number) for number in range(1000)])

    def die(part: str, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preparer(file, progress=die)
    assert len(preparer(file).train) == 1000


def test_processes_of_one_machine_share_the_work_of_one(preparer: Preparer, data_file: Write, tmp_path: Path) -> None:
    file = data_file("a.jsonl", [row(number) for number in range(2000)])
    counts = tmp_path / "counts"

    def work() -> None:
        def note(part: str, rows: int) -> None:
            with counts.open("a") as log:
                log.write(f"{os.getpid()} {rows}\n")

        preparer(file, progress=note)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert [line.split()[1] for line in counts.read_text().splitlines()] == ["1000", "2000"]


def test_any_number_of_processes_prepares_the_same(
    preparer: Preparer, data_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [row(number) for number in range(2500)]
    rows[2100] = {"messages": []}
    file = data_file("a.jsonl", rows)
    spec = {"on_invalid_row": InvalidRowPolicy.DROP, "validation": ValidationData(fraction=0.01)}
    one, three = (preparer(file, spec=spec, processes=count, scratch=preparer.scratch / str(count)) for count in (1, 3))
    assert one.train[:] == three.train[:]
    assert one.validation is not None
    assert three.validation is not None
    assert one.validation[:] == three.validation[:]
    assert one.report == three.report
    assert one.report["training"]["dropped"]["first"][0].startswith("s3://bucket/data/a.jsonl:2101: messages is empty")


def test_no_process_is_left_when_the_work_is_broken_off(preparer: Preparer, data_file: Write) -> None:
    file = data_file("a.jsonl", [row(number) for number in range(4000)])
    children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    before = Path(children).read_text().split()

    def stop(part: str, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preparer(file, processes=2, progress=stop)
    assert Path(children).read_text().split() == before


PREPARE = """
import sys
from pathlib import Path
from finetune_api.job import DatasetSpec, TaskType
from finetune_trainer.data.preparation import prepare
from finetune_trainer.data.sources import NamedFile
from tests.data import tokenizers

file = NamedFile("s3://b/a.txt", Path(sys.argv[1]))
prepare(
    [file], DatasetSpec(uri="s3://b/a.txt"), TaskType.CAUSAL_LM, tokenizers.words(tokenizers.CHATML),
    max_length=512, seed=1, scratch=Path(sys.argv[2]), packing=True, processes=int(sys.argv[3]),
)
"""


def peak(rows: int, words: int, processes: int, data_file: Write, scratch: Path) -> float:
    """MiB that preparing so many rows takes in all processes together; mapped files are the page cache's."""
    file = data_file(f"{rows}.txt", ("yes no train data " * (words // 4) + "\n") * rows)
    command = [sys.executable, "-c", PREPARE, str(file.path), str(scratch), str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    with Peak(process.pid) as peak:
        assert process.wait() == 0
    return peak.most.anonymous / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("few", "many", "words", "processes"), [(1_500, 6_000, 2_000, 1), (20_000, 100_000, 20, 2)], ids=["long", "short"]
)
def test_memory_does_not_grow_with_the_dataset(
    data_file: Write, tmp_path: Path, few: int, many: int, words: int, processes: int
) -> None:
    small, large = (peak(rows, words, processes, data_file, tmp_path / str(rows)) for rows in (few, many))
    assert large - small < 40, f"{small:.0f} MiB for {few} rows, {large:.0f} MiB for {many}"
