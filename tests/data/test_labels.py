"""Labels are read as names of classes or as numbers; what is neither is told with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.task import TaskSpec
from finetune_trainer.data.labels import labels_of, ordered
from finetune_trainer.data.problems import RowError
from finetune_trainer.errors import DataError


def read(value: Any, **task: Any) -> Any:
    return labels_of(TaskSpec.from_wire({"type": "SequenceClassification"} | task)).read(value)


def refusal(value: Any, **task: Any) -> str:
    with pytest.raises(RowError) as caught:
        read(value, **task)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "name"), [("yes", "yes"), (" yes ", "yes"), (3, "3"), (-1, "-1"), (3.0, "3"), ("3", "3"), (True, "true")]
)
def test_without_labels_in_the_spec_whatever_stands_there_is_a_name(value, name):
    assert read(value) == name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "label is null"),
        ("  ", "label is empty"),
        (0.5, "label is the number 0.5; for numbers set task.type to Regression"),
        (float("nan"), "label is the number nan"),
        (["a"], "label is a list; for several classes set task.multiLabel to true"),
        ({"a": 1}, "label is an object"),
        ("x" * 129, "label has 129 characters"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_what_names_no_class_is_refused(value, words):
    assert words in refusal(value)


def test_with_labels_in_the_spec_names_and_numbers_from_0_are_taken():
    labels = {"labels": ["negative", "positive"]}
    assert [read(value, **labels) for value in ("positive", 0, "1", 1.0)] == [
        "positive",
        "negative",
        "positive",
        "positive",
    ]
    assert "label is the number 2, but task.labels are 0 to 1" in refusal(2, **labels)
    assert "label is the number -1" in refusal(-1, **labels)


def test_numbers_are_names_where_the_labels_are_numbers_themselves():
    stars = {"labels": ["1", "2", "3"]}
    assert read(1, **stars) == "1"
    assert "label '0' is none of task.labels" in refusal(0, **stars)


def test_a_name_that_is_not_among_the_labels_is_told_with_those_near_it():
    text = refusal("postive", labels=["negative", "positive", "mixed"])
    assert text.startswith("label 'postive' is none of task.labels; near it: 'positive'")


def test_held_out_rows_can_only_be_asked_for_what_is_learned():
    labels = labels_of(TaskSpec.from_wire({"type": "SequenceClassification"}))
    with pytest.raises(RowError, match="label 'c' is none of the labels of the training rows; near it: 'a', 'b'"):
        labels.among(("a", "b")).read("c")


def test_several_classes_are_a_list_also_as_text_of_csv():
    many = {"multiLabel": True}
    assert read(["b", "a"], **many) == ["b", "a"]
    assert read('["b", 1]', **many) == ["b", "1"]
    assert read([], **many) == []
    assert read([1, 0], labels=["no", "yes"], **many) == ["yes", "no"]
    assert "label is a string; with task.multiLabel it must be a list" in refusal("a", **many)
    assert "label is null" in refusal(None, **many)
    assert "names a class twice" in refusal([0, 1, 1], **many)


@pytest.mark.parametrize(("value", "number"), [(1, 1.0), (-2.5, -2.5), ("3.25", 3.25), (" 1e3 ", 1000.0)])
def test_numbers_are_read_also_as_text(value, number):
    assert read(value, type="Regression") == number


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("high", "label is 'high'; task Regression learns numbers"),
        ("", "label is ''"),
        (None, "label is null"),
        (True, "label is a boolean"),
        ([1.0], "label is a list"),
        (float("nan"), "label is nan; it must be a finite number"),
        ("inf", "label is inf"),
        (10**400, "label is inf"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_number_is_refused(value, words):
    assert words in refusal(value, type="Regression")


def test_classes_are_in_the_order_of_their_names_and_numbers_in_that_of_their_size():
    assert ordered(["b", "a", "c", "a"]) == ("a", "b", "c")
    assert ordered(["10", "9", "-1"]) == ("-1", "9", "10")
    assert ordered(["10", "9", "x"]) == ("10", "9", "x")


def test_one_class_teaches_nothing_and_thousands_are_no_classes():
    with pytest.raises(DataError, match="nothing to tell apart: there is one class, 'a'"):
        ordered(["a", "a"])
    with pytest.raises(DataError, match="no row has a class"):
        ordered([])
    with pytest.raises(DataError, match="4097 different labels") as refusal:
        ordered(map(str, range(4097)))
    assert "Regression" in refusal.value.advice
