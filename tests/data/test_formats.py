"""Each format as a function from a row to what is learned, and the refusals in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.job import TaskType
from finetune_trainer.data.conversations import Conversation
from finetune_trainer.data.formats import (
    FORMATS,
    Completion,
    Text,
    alpaca,
    detect,
    messages,
    prompt_completion,
    sharegpt,
    text,
)
from finetune_trainer.data.problems import RowError
from finetune_trainer.errors import DataError

ASK = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "because"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def test_messages_are_kept_with_tools_and_calls_and_arguments_become_objects() -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    read = messages({"messages": [SYSTEM, ASK, calling, result, ANSWER], "tools": json.dumps([TOOL])})
    assert read.tools == [TOOL]
    assert read.messages[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    }
    assert read.messages[3]["tool_call_id"] == "1"


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]
    assert messages({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0]["content"] == "why?"


def test_nulls_that_parquet_puts_into_every_struct_are_left_out() -> None:
    turns = [ASK | {"name": None, "tool_calls": None}, ANSWER | {"tool_calls": None}]
    assert messages({"messages": turns, "tools": None}) == Conversation([ASK, ANSWER])


def test_lists_written_as_json_in_a_csv_column_are_read() -> None:
    assert messages({"messages": json.dumps([ASK, ANSWER])}) == Conversation([ASK, ANSWER])


@pytest.mark.parametrize("human", ["human", "user", "Human"])
@pytest.mark.parametrize("model", ["gpt", "assistant", "chatgpt", "bing", "bard", "model"])
def test_speakers_of_sharegpt_are_mapped_to_roles(human: str, model: str) -> None:
    row = {"conversations": [{"from": human, "value": "why?"}, {"from": model, "value": "because"}]}
    assert sharegpt(row) == Conversation([ASK, ANSWER])


@pytest.mark.parametrize("speaker", ["tool", "function", "observation", "function_response"])
def test_results_of_tools_in_sharegpt_are_turns_of_the_tool(speaker: str) -> None:
    turns = [("human", "why?"), ("gpt", "let me see"), (speaker, "42"), ("gpt", "because")]
    read = sharegpt({"conversations": [{"from": who, "value": what} for who, what in turns]})
    assert [turn["role"] for turn in read.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("row", [{"system": "be brief"}, {}])
def test_sharegpt_takes_a_system_prompt_beside_or_inside_the_turns(row: dict[str, Any]) -> None:
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]
    inside = [] if row else [{"from": "system", "value": "be brief"}]
    assert sharegpt(row | {"conversations": inside + turns}) == Conversation([SYSTEM, ASK, ANSWER])


def test_alpaca_puts_the_input_under_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "rendered before"}
    assert alpaca(row).messages == [
        {"role": "user", "content": "Add.\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert alpaca(row | {"input": ""}).messages[0]["content"] == "Add."
    assert alpaca(row | {"input": None}).messages[0]["content"] == "Add."


def test_a_prompt_and_its_completion_are_text_or_messages() -> None:
    assert prompt_completion({"prompt": "2+2=", "completion": " 4"}) == Completion("2+2=", " 4")
    earlier = [ASK, ANSWER, ASK]
    read = prompt_completion({"prompt": earlier, "completion": [ANSWER]})
    assert read == Conversation([*earlier, ANSWER], learned_from=3)


def test_text_is_learned_whole() -> None:
    assert text({"text": " as it is\n"}) == Text(" as it is\n")


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"text": "x"}, "messages is missing; the fields here are text"),
    ("messages", {"messages": []}, "messages is empty: a conversation has at least a question and an answer"),
    ("messages", {"messages": "hello"}, "messages is a string; it must be a list of turns"),
    ("messages", {"messages": {"role": "user"}}, "messages is an object; it must be a list"),
    ("messages", {"messages": [ASK, "because"]}, r"messages\[1\] is a string; it must be an object"),
    (
        "messages",
        {"messages": [ASK, {"role": "assistant"}]},
        r"messages\[1\]\.content is missing; the fields here are role",
    ),
    ("messages", {"messages": [ASK, {"content": "x"}]}, r"messages\[1\]\.role is missing; the fields here are content"),
    (
        "messages",
        {"messages": [ASK, ANSWER | {"content": 7}]},
        r"messages\[1\]\.content is a number; it must be a string",
    ),
    ("messages", {"messages": [ASK, ANSWER | {"content": True}]}, "is a boolean"),
    (
        "messages",
        {"messages": [ASK, ANSWER | {"content": None}]},
        r"messages\[1\]\.content is null; it must be a string",
    ),
    ("messages", {"messages": [ASK, ANSWER | {"content": " \n"}]}, r"messages\[1\]: the assistant's turn is empty"),
    ("messages", {"messages": [ASK | {"role": "robot"}, ANSWER]}, r"messages\[0\]\.role is 'robot'; known are system"),
    ("messages", {"messages": [ASK | {"content": [{"type": "image_url"}]}, ANSWER]}, "of type 'image_url'; only parts"),
    ("messages", {"messages": [ASK]}, "there is no assistant turn"),
    ("messages", {"messages": [ANSWER]}, "turn 1 is from assistant at the beginning, where system or user is expected"),
    ("messages", {"messages": [ASK, ASK, ANSWER]}, "turn 2 is from user after user, where assistant is expected"),
    ("messages", {"messages": [ASK, ANSWER, ANSWER]}, "turn 3 is from assistant after assistant"),
    ("messages", {"messages": [ASK, SYSTEM, ANSWER]}, "turn 2 is from system after user"),
    ("messages", {"messages": [SYSTEM, ANSWER]}, "turn 2 is from assistant after system, where user is expected"),
    ("messages", {"messages": [ASK, ANSWER], "tools": "weather"}, "tools is a string; it must be a list of objects"),
    ("messages", {"messages": [ASK, ANSWER | {"tool_calls": "x"}]}, r"messages\[1\]\.tool_calls is a string"),
    (
        "messages",
        {"messages": [ASK, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}]},
        r"messages\[1\]\.tool_calls\[0\]\.arguments is not JSON",
    ),
    ("messages", {"messages": [ASK, ANSWER | {"content": "\ud800"}]}, "half a surrogate pair at character 1"),
    ("sharegpt", {"conversations": [{"from": "human", "text": "x"}]}, r"conversations\[0\]\.value is missing"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, r"from is 'alien'; known are .*human, gpt"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "hello"}]}, "turn 1 is from assistant at the beginning"),
    ("alpaca", {"instruction": "Add.", "output": " "}, "output is empty, so there is nothing to learn"),
    (
        "alpaca",
        {"instruction": "Add.", "response": "3"},
        "output is missing; the fields here are instruction, response",
    ),
    ("alpaca", {"instruction": ["Add."], "output": "3"}, "instruction is a list; it must be a string"),
    ("prompt-completion", {"prompt": "2+2="}, "completion is missing; the fields here are prompt"),
    ("prompt-completion", {"prompt": "2+2=", "completion": 4}, "completion is a number"),
    ("prompt-completion", {"prompt": [ASK], "completion": []}, "completion is empty"),
    (
        "prompt-completion",
        {"prompt": [ASK, ANSWER], "completion": [ASK]},
        "prompt and completion: there is no assistant",
    ),
    ("text", {"text": ""}, "text is empty"),
    ("text", {"body": "x"}, "text is missing; the fields here are body"),
    ("text", {}, "text is missing; the fields here are none"),
]


@pytest.mark.parametrize(("name", "row", "reason"), REFUSALS, ids=[f"{name}-{reason}" for name, _, reason in REFUSALS])
def test_a_wrong_row_is_refused_with_the_field_and_what_it_must_be(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        FORMATS[name].read(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [ASK, ANSWER]}, "messages"),
        ({"messages": json.dumps([ASK, ANSWER])}, "messages"),
        ({"conversations": [ASK, ANSWER]}, "messages"),
        ({"id": 1, "conversations": [{"from": "human", "value": "x"}]}, "sharegpt"),
        ({"instruction": "x", "input": "", "output": "y", "text": "x y"}, "alpaca"),
        ({"prompt": "x", "completion": "y"}, "prompt-completion"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "prompt-completion"),
    ],
)
def test_the_format_is_told_from_a_row(row: dict[str, Any], name: str) -> None:
    assert detect([row], TaskType.INSTRUCTION, "a.jsonl:1").name == name


def test_a_broken_first_row_does_not_hide_the_format() -> None:
    assert detect([{"messages": []}, {"messages": [ASK, ANSWER]}], TaskType.INSTRUCTION, "a.jsonl:1").name == "messages"


def test_only_text_counts_for_a_language_model() -> None:
    row = {"instruction": "x", "output": "y", "text": "x y"}
    assert detect([row], TaskType.CAUSAL_LM, "a.jsonl:1").name == "text"


def test_an_unknown_format_says_what_was_found_and_what_is_known() -> None:
    with pytest.raises(DataError) as refusal:
        detect([{"question": "x", "answer": "y"}], TaskType.INSTRUCTION, "s3://b/a.jsonl:1")
    assert "s3://b/a.jsonl:1" in refusal.value.message
    assert "its first row has question, answer" in refusal.value.message
    for known in ("messages", "sharegpt", "alpaca (instruction, input, output)", "prompt-completion"):
        assert known in refusal.value.message


@pytest.mark.parametrize(
    ("row", "task", "way_out"),
    [
        ({"text": "x"}, TaskType.INSTRUCTION, "the rows look like text: set task.type to CausalLM"),
        ({"messages": [ASK, ANSWER]}, TaskType.CAUSAL_LM, "the rows look like messages: set task.type to Instruction"),
    ],
)
def test_data_for_another_task_names_that_task(row: dict[str, Any], task: TaskType, way_out: str) -> None:
    with pytest.raises(DataError) as refusal:
        detect([row], task, "a.jsonl:1")
    assert refusal.value.advice == way_out
