"""Labelled texts, from files to tokens and labels: what is refused, cut, held out and reported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import DatasetSpec
from finetune_api.task import TaskSpec
from finetune_trainer.data import workers
from finetune_trainer.data.labeled import PreparedLabels, prepare_labeled
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.data.splits import held_out_evenly
from finetune_trainer.errors import DataError
from tests.support.models import pair_tokenizer

Write = Callable[[str, Any], NamedFile]
TOKENIZER = pair_tokenizer()
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
CLS, SEP = "<|im_start|>", "<|im_end|>"


def prepared(
    scratch: Path,
    *files: NamedFile,
    task: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    max_length: int = 32,
    **options: Any,
) -> PreparedLabels:
    return prepare_labeled(
        files,
        DatasetSpec.from_wire({"uri": "s3://bucket/data/*"} | (spec or {})),
        TaskSpec.from_wire({"type": "SequenceClassification"} | (task or {})),
        TOKENIZER,
        **{"limit": f"hyperparameters.maxLength {max_length}", "typed": True, "seed": 1, "scratch": scratch} | options,
        max_length=max_length,
    )


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def texts(result: PreparedLabels) -> list[str]:
    return [TOKENIZER.decode(row["input_ids"]) for row in result.train]


def refusal(*arguments: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prepared(*arguments, **options)
    assert caught.value.advice
    return caught.value


def test_a_text_is_tokenised_as_the_model_reads_it_and_labels_are_numbers_of_sorted_classes(tmp_path, data_file):
    result = prepared(tmp_path, data_file("a.jsonl", rows("no", "yes", "maybe")))
    assert texts(result)[0] == f"{CLS}text 0{SEP}"
    assert result.classes == ("maybe", "no", "yes")
    assert list(result.train["labels"]) == [1, 2, 0]
    assert result.train.column_names == ["input_ids", "token_type_ids", "labels"]
    assert result.report["format"] == "labeled"
    assert result.report["labels"]["training"] == {"maybe": 1, "no": 1, "yes": 1}
    assert result.report["training"]["sample"] == f"{CLS}text 0{SEP} -> no"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\nfine,1\nbad,0\n"),
        ("a.jsonl", [{"text": "fine", "label": 1}, {"text": "bad", "label": 0}]),
        ("a.json", json.dumps([{"text": "fine", "label": "1"}, {"text": "bad", "label": "0"}])),
    ],
)
def test_every_kind_of_file_gives_the_same_classes(tmp_path, data_file, name, content):
    result = prepared(tmp_path, data_file(name, content))
    assert (result.classes, list(result.train["labels"])) == (("0", "1"), [1, 0])


@pytest.mark.parametrize(
    ("name", "task", "classes"),
    [
        ("labels.csv", {}, ("complaint", "praise", "question")),
        ("pairs.jsonl", {}, ("other", "same")),
        ("several-labels.jsonl", {"multiLabel": True}, ("battery", "case", "screen")),
        ("numbers.csv", {"type": "Regression"}, ()),
    ],
)
def test_every_example_file_is_recognised_and_used_whole(tmp_path, name, task, classes):
    result = prepared(tmp_path, NamedFile(f"s3://bucket/{name}", EXAMPLES / name), task=task, max_length=128)
    assert (result.classes, result.report["warnings"]) == (classes, [])
    assert len(result.train) == result.report["training"]["rows"] > 1


def test_labels_of_the_spec_give_the_order_and_absent_ones_are_told(tmp_path, data_file):
    task = {"labels": ["yes", "unsure", "no"]}
    result = prepared(tmp_path, data_file("a.jsonl", rows("no", "yes", 0)), task=task)
    assert (result.classes, list(result.train["labels"])) == (("yes", "unsure", "no"), [2, 0, 0])
    assert result.report["warnings"] == [
        "training: 1 of 3 classes have no row and cannot be learned: 'unsure'",
    ]


def test_the_order_of_a_model_that_knows_the_same_classes_is_taken(tmp_path, data_file):
    file = data_file("a.jsonl", rows("no", "yes"))
    assert prepared(tmp_path, file, order=("yes", "no")).classes == ("yes", "no")
    assert list(prepared(tmp_path, file, order=("yes", "no")).train["labels"]) == [1, 0]
    assert prepared(tmp_path, file, order=("yes", "maybe")).classes == ("no", "yes")


def test_two_texts_are_told_apart(tmp_path, data_file):
    pairs = [{"text": "one", "textPair": "two", "label": 1}, {"text": "alone", "label": 0}]
    result = prepared(tmp_path, data_file("a.jsonl", pairs))
    assert texts(result) == [f"{CLS}one{SEP}two{SEP}", f"{CLS}alone{SEP}"]
    assert list(result.train["token_type_ids"]) == [[0] * 5 + [1] * 4, [0] * 7]
    untyped = prepared(tmp_path, data_file("a.jsonl", pairs), typed=False)
    assert untyped.train.column_names == ["input_ids", "labels"]


def test_long_texts_are_cut_within_their_special_tokens_and_counted(tmp_path, data_file):
    long = [{"text": "x" * 40, "textPair": "y" * 10, "label": 0}, {"text": "short", "label": 1}]
    result = prepared(tmp_path, data_file("a.jsonl", long), limit="the model's 32 tokens")
    assert texts(result)[0] == f"{CLS}{'x' * 19}{SEP}{'y' * 10}{SEP}"
    assert result.report["training"]["cutTokens"] == 21
    assert result.report["warnings"] == [
        "training: 1 of 2 rows were cut to the model's 32 tokens (21 tokens lost; the longest row has 53); their ends "
        "are not learned"
    ]
    assert result.report["maxLength"] == "the model's 32 tokens"


def test_several_classes_are_lists_of_numbers(tmp_path, data_file):
    result = prepared(tmp_path, data_file("a.jsonl", rows(["b", "a"], [], ["c"])), task={"multiLabel": True})
    assert result.classes == ("a", "b", "c")
    assert list(result.train["labels"]) == [[1, 0], [], [2]]
    assert result.report["labels"]["training"] == {"a": 1, "b": 1, "c": 1}


def test_numbers_stay_numbers_and_are_described(tmp_path, data_file):
    result = prepared(tmp_path, data_file("a.jsonl", rows(1, 2.5, "4")), task={"type": "Regression"})
    assert (result.classes, list(result.train["labels"])) == ((), [1.0, 2.5, 4.0])
    assert result.report["labels"]["training"]["mean"] == pytest.approx(2.5)
    far = prepared(tmp_path, data_file("b.jsonl", rows(100000, 300000)), task={"type": "Regression"})
    assert (
        "the labels are about 2e+05, give or take 1e+05; numbers near 1 are learned best" in far.report["warnings"][0]
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "a.jsonl:3: label is missing; the fields here are text"),
        ({"text": "x", "label": None}, "a.jsonl:3: label is null"),
        ({"text": " ", "label": "yes"}, "a.jsonl:3: text is empty, so there is nothing to learn"),
        ({"text": 7, "label": "yes"}, "a.jsonl:3: text is a number; it must be a string"),
        ({"text": "x", "textPair": "", "label": "yes"}, "a.jsonl:3: textPair is empty"),
        ({"label": "yes"}, "a.jsonl:3: text is missing; the fields here are label"),
        ({"text": "x", "label": "yess"}, "a.jsonl:3: label 'yess' is none of task.labels; near it: 'yes'"),
    ],
    ids=str,
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path, data_file, row, words):
    file = data_file("a.jsonl", [*rows("no", "yes"), row])
    assert words in refusal(tmp_path, file, task={"labels": ["no", "yes"]}).message
    dropped = prepared(tmp_path, file, task={"labels": ["no", "yes"]}, spec={"onInvalidRow": "Drop"})
    assert dropped.report["training"]["dropped"]["count"] == 1
    assert len(dropped.train) == 2


def test_a_number_that_is_none_is_named_by_file_and_line(tmp_path, data_file):
    file = data_file("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": NaN}\n{"text": "y", "label": "z"}\n')
    message = refusal(tmp_path, file, task={"type": "Regression"}).message
    assert "a.jsonl:2: label is nan; it must be a finite number" in message
    assert "a.jsonl:3: label is 'z'; task Regression learns numbers" in message


def test_rows_without_labels_are_told_how_to_name_the_columns(tmp_path, data_file):
    error = refusal(tmp_path, data_file("a.csv", "review,stars\nfine,5\n"))
    assert "its first row has review, stars" in error.message
    assert "labeled (text, perhaps textPair, and label)" in error.message
    assert error.advice == "say in dataset.columns what the data calls them, such as {text: review, label: stars}"


def test_what_cannot_be_learned_is_refused(tmp_path, data_file):
    assert "there is one class, 'yes'" in refusal(tmp_path, data_file("a.jsonl", rows("yes", "yes"))).message
    same = refusal(tmp_path, data_file("b.jsonl", rows(2, 2)), task={"type": "Regression"})
    assert "the training rows all have the label 2" in same.message


def test_the_same_share_of_every_class_is_held_out(tmp_path, data_file):
    labels = ["often"] * 60 + ["sometimes"] * 30 + ["rarely"] * 9 + ["once"]
    spec = {"validation": {"fraction": 0.2}}
    result = prepared(tmp_path, data_file("a.jsonl", rows(*labels)), spec=spec)
    assert result.report["labels"]["validation"] == pytest.approx(
        {"often": 12, "sometimes": 6, "rarely": 2, "once": 0}, abs=1
    )
    assert len(result.validation) == 20
    assert result.report["labels"]["training"]["once"] == 1
    assert "validation: 1 of 4 classes have no row and are not measured: 'once'" in result.report["warnings"]
    again = prepared(tmp_path / "other", data_file("a.jsonl", rows(*labels)), spec=spec)
    assert list(again.validation["input_ids"]) == list(result.validation["input_ids"])


def test_however_much_is_held_out_each_class_is_learned():
    classes = ["a", "b", "b", "c", "c", "c"]
    held = held_out_evenly(range(6), classes, 0.9, seed=3)
    assert Counter(classes[row] for row in set(range(6)) - set(held)) == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(DataError, match="every class has a single row"):
        held_out_evenly(range(2), ["a", "b"], 0.5, seed=3)


def test_held_out_rows_of_unlearned_classes_are_named(tmp_path, data_file):
    training = data_file("a.jsonl", rows("no", "yes"))
    others = data_file("b.jsonl", rows("no", "maybe"))
    message = refusal(tmp_path, training, validation_files=[others]).message
    assert "b.jsonl:2: label 'maybe' is none of the labels of the training rows" in message
    dropped = prepared(tmp_path, training, validation_files=[others], spec={"onInvalidRow": "Drop"})
    assert list(dropped.validation["labels"]) == [0]


def test_one_held_out_number_is_too_few(tmp_path, data_file):
    files = {"validation_files": [data_file("b.jsonl", rows(1))], "task": {"type": "Regression"}}
    assert "there is one held-out row" in refusal(tmp_path, data_file("a.jsonl", rows(1, 2)), **files).message


def test_several_processes_give_the_same_rows_in_the_same_order(tmp_path, data_file, monkeypatch):
    monkeypatch.setattr(workers, "INLINE_ROWS", 10)
    file = data_file("a.jsonl", rows(*(["b", "a", "c"] * 100)))
    one, three = (prepared(tmp_path / str(n), file, processes=n) for n in (1, 3))
    assert one.train.to_list() == three.train.to_list()


def test_what_was_prepared_is_found_again(tmp_path, data_file):
    file = data_file("a.jsonl", rows("no", "yes"))
    first = prepared(tmp_path, file)
    folders = set((tmp_path / "prepared").iterdir())
    assert prepared(tmp_path, file).train.to_list() == first.train.to_list()
    assert set((tmp_path / "prepared").iterdir()) == folders
    prepared(tmp_path, file, task={"labels": ["yes", "no"]})
    assert set((tmp_path / "prepared").iterdir()) > folders
